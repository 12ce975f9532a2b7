/* The least that a user-space UDP forwarder has to do on this kernel, to compare the balancer with.
 *
 *   floor copy BACKEND_PORT            copies between a listener and one connected upstream socket
 *   floor nat BACKEND_PORT PROCESSES   one upstream socket per client address, found by array index
 *
 * Both use the system calls and socket options of the balancer: recvmmsg with UDP_GRO into 64 slots
 * of 64 KiB, ECN asked for, sendmmsg or send with UDP_SEGMENT, datagrams of one flow within a batch
 * joined, fragmentation refused, a level-triggered poller with the same budgets. Neither looks at
 * an octet of payload, checks an address, keeps a timer or counts anything. Everything is on
 * 127.0.0.1; clients of "nat" have addresses from 127.16.0.0 on. The port is printed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    SLOTS = 64,
    SLOT_LEN = 65536,
    SLOT_STRIDE = SLOT_LEN + 19 * 64,
    MAX_SEGMENTS = 64,
    MAX_SEND = 65535 - 40 - 8,
    FLOWS = 1 << 17,
    READY = 256,
    BATCHES = 4,
    FLOW_MESSAGES = 8,
    LISTENER = -1,
    FIRST_CLIENT = 127 << 24 | 16 << 16,
};

struct flow {
    int fd;
    int head, tail; /* its messages of this batch, or -1 */
    struct sockaddr_in client;
};

static char memory[SLOTS * SLOT_STRIDE];
static struct sockaddr_in names[SLOTS];
static char controls[SLOTS][96] __attribute__((aligned(8)));
static struct iovec slots[SLOTS];
static struct mmsghdr in[SLOTS], out[SLOTS];
static struct iovec parts[SLOTS];
static struct sockaddr_in out_names[SLOTS];
static char out_controls[SLOTS][CMSG_SPACE(2)] __attribute__((aligned(8)));
static int segment[SLOTS], next_of[SLOTS], flow_of[SLOTS], touched[SLOTS];
static struct flow flows[FLOWS];
static int listener, upstream, poller, copying, messages, part_count;
static struct sockaddr_in backend, source, last_client;

static void check(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void set(int fd, int level, int option, int value) {
    check(setsockopt(fd, level, option, &value, sizeof value), "setsockopt");
}

static int open_socket(int buffer) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    check(fd, "socket");
    set(fd, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE);
    set(fd, IPPROTO_IP, IP_RECVTOS, 1);
    set(fd, SOL_UDP, UDP_GRO, 1);
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer) < 0)
        set(fd, SOL_SOCKET, SO_RCVBUF, buffer);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer) < 0)
        set(fd, SOL_SOCKET, SO_SNDBUF, buffer);
    return fd;
}

static void watch(int fd, int token) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)(int64_t)token};
    check(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static int open_upstream(int token) {
    int fd = open_socket(1 << 20);
    check(bind(fd, (struct sockaddr *)&source, sizeof source), "bind");
    check(connect(fd, (struct sockaddr *)&backend, sizeof backend), "connect");
    watch(fd, token);
    return fd;
}

/* Fills slots from `first` on; says how many. */
static int receive(int fd, int first, int limit, int named) {
    for (int i = first; i < limit; i++) {
        struct msghdr *m = &in[i].msg_hdr;
        slots[i] = (struct iovec){memory + (size_t)i * SLOT_STRIDE, SLOT_LEN};
        m->msg_iov = &slots[i];
        m->msg_iovlen = 1;
        m->msg_control = controls[i];
        m->msg_controllen = sizeof controls[i];
        m->msg_name = named ? &names[i] : NULL;
        m->msg_namelen = sizeof names[i];
    }
    int got = recvmmsg(fd, in + first, (unsigned)(limit - first), MSG_DONTWAIT, NULL);
    for (int i = first; i < first + got; i++) {
        segment[i] = (int)in[i].msg_len;
        struct msghdr *m = &in[i].msg_hdr;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c))
            if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO)
                memcpy(&segment[i], CMSG_DATA(c), sizeof(int));
    }
    return got < 0 ? 0 : got;
}

/* Adds the messages in `first` and its successors to what is to be sent, as few sends. */
static void describe(int first, const struct sockaddr_in *to) {
    for (int i = first; i >= 0;) {
        int size = segment[i], count = 0, octets = 0, from = part_count;
        do {
            int len = (int)in[i].msg_len;
            parts[part_count++] = (struct iovec){memory + (size_t)i * SLOT_STRIDE, (size_t)len};
            octets += len;
            count += size ? (len + size - 1) / size : 1;
            i = next_of[i];
        } while (i >= 0 && size && octets == size * count && in[i].msg_len &&
                 (segment[i] == size || (int)in[i].msg_len <= size) &&
                 count + ((int)in[i].msg_len + size - 1) / size <= MAX_SEGMENTS &&
                 octets + (int)in[i].msg_len <= MAX_SEND);
        struct msghdr *m = &out[messages].msg_hdr;
        *m = (struct msghdr){.msg_iov = parts + from, .msg_iovlen = (size_t)(part_count - from)};
        if (to) {
            out_names[messages] = *to;
            m->msg_name = &out_names[messages];
            m->msg_namelen = sizeof *to;
        }
        if (count > 1) {
            m->msg_control = out_controls[messages];
            m->msg_controllen = CMSG_SPACE(2);
            struct cmsghdr *c = CMSG_FIRSTHDR(m);
            c->cmsg_level = SOL_UDP;
            c->cmsg_type = UDP_SEGMENT;
            c->cmsg_len = CMSG_LEN(2);
            uint16_t value = (uint16_t)size;
            memcpy(CMSG_DATA(c), &value, sizeof value);
        }
        messages++;
    }
}

static void transmit(int fd) {
    for (int at = 0; at < messages;) {
        int sent = sendmmsg(fd, out + at, (unsigned)(messages - at), MSG_DONTWAIT);
        at += sent > 0 ? sent : errno == ECONNREFUSED ? 0 : 1;
    }
    messages = part_count = 0;
}

static void forward(int got) {
    if (copying) {
        for (int i = 0; i < got; i++)
            next_of[i] = i + 1 < got ? i + 1 : -1;
        last_client = names[got - 1];
        describe(0, NULL);
        transmit(upstream);
        return;
    }
    int count = 0;
    for (int i = 0; i < got; i++) {
        int index = (int)((ntohl(names[i].sin_addr.s_addr) - FIRST_CLIENT) & (FLOWS - 1));
        struct flow *flow = &flows[index];
        if (flow->fd < 0) {
            flow->fd = open_upstream(index);
            flow->client = names[i];
        }
        next_of[i] = -1;
        if (flow->head < 0) {
            flow->head = i;
            touched[count++] = index;
        } else {
            next_of[flow->tail] = i;
        }
        flow->tail = i;
    }
    for (int i = 0; i < count; i++) {
        struct flow *flow = &flows[touched[i]];
        int head = flow->head;
        flow->head = -1;
        if (next_of[head] < 0 && segment[head] == (int)in[head].msg_len) {
            send(flow->fd, memory + (size_t)head * SLOT_STRIDE, in[head].msg_len, MSG_DONTWAIT);
        } else {
            describe(head, NULL);
            transmit(flow->fd);
        }
    }
}

static void send_back(int filled) {
    for (int i = 0; i < filled;) {
        int first = i;
        for (i++; i < filled && flow_of[i] == flow_of[first]; i++)
            next_of[i - 1] = i;
        next_of[i - 1] = -1;
        describe(first, copying ? &last_client : &flows[flow_of[first]].client);
    }
    transmit(listener);
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    copying = !strcmp(argv[1], "copy");
    int processes = atoi(argv[3]);
    backend = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2])),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof name;
    /* Each process opens its sockets before the next one is made, which joins it on the port. */
    for (int process = 0;; process++) {
        poller = epoll_create1(0);
        check(poller, "epoll_create1");
        listener = open_socket(8 << 20);
        set(listener, SOL_SOCKET, SO_REUSEPORT, 1);
        check(bind(listener, (struct sockaddr *)&name, len), "bind");
        check(getsockname(listener, (struct sockaddr *)&name, &len), "getsockname");
        watch(listener, LISTENER);
        /* Source addresses of their own: one has not ports enough for all forwarders. */
        source = (struct sockaddr_in){.sin_family = AF_INET,
                                      .sin_addr.s_addr = htonl(INADDR_LOOPBACK + 40 + (uint32_t)process)};
        if (process + 1 == processes)
            break;
        int child = fork();
        check(child, "fork");
        if (child > 0)
            break;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(listener);
        close(poller);
    }
    for (int i = 0; i < FLOWS; i++)
        flows[i] = (struct flow){.fd = -1, .head = -1};
    if (copying)
        upstream = open_upstream(0);
    if (source.sin_addr.s_addr == htonl(INADDR_LOOPBACK + 40 + (uint32_t)processes - 1)) {
        printf("%d\n", ntohs(name.sin_port));
        fflush(stdout);
    }
    for (;;) {
        struct epoll_event events[READY];
        int ready = epoll_wait(poller, events, READY, 100);
        int filled = 0, asked = ready == READY;
        int share = ready * FLOW_MESSAGES < SLOTS ? SLOTS / (ready > 0 ? ready : 1) : FLOW_MESSAGES;
        for (int i = 0; i < ready; i++) {
            int token = (int)(int64_t)events[i].data.u64;
            if (token == LISTENER) {
                asked = 1;
                continue;
            }
            if (filled == SLOTS) {
                send_back(filled);
                filled = 0;
            }
            int limit = filled + share < SLOTS ? filled + share : SLOTS;
            int got = receive(copying ? upstream : flows[token].fd, filled, limit, 0);
            for (int k = 0; k < got; k++)
                flow_of[filled + k] = token;
            filled += got;
        }
        if (filled)
            send_back(filled);
        for (int batch = 0; asked && batch < BATCHES; batch++) {
            int got = receive(listener, 0, SLOTS, 1);
            if (got > 0)
                forward(got);
            if (got < SLOTS)
                break;
        }
    }
}
