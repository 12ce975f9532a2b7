//! Keys leave nothing behind in memory that is given back.

#![expect(unsafe_code, reason = "the only way to see what is given back")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
};

use quic_lb_config::{Surroundings, from_str, read_reset_secret, read_text};

/// Looks for keys in all memory that is given back, while it is told to.
struct Searching;

static SEARCHES: AtomicBool = AtomicBool::new(false);
/// What was found, a bit for each of [`NEEDLES`].
static FOUND: AtomicU32 = AtomicU32::new(0);

/// Keys as text and as octets: the start of each will do. What AES makes of a key begins with it, with the instructions of most
/// processors.
const NEEDLES: [(&str, &[u8]); 8] = [
    ("the key in the file, as text", b"1f95f09245765f80"),
    ("the key in the file", &[0x1f, 0x95, 0xf0, 0x92, 0x45, 0x76, 0x5f, 0x80]),
    ("the key in another file, as text", b"2f95f09245765f80"),
    ("the key in another file", &[0x2f, 0x95, 0xf0, 0x92, 0x45, 0x76, 0x5f, 0x80]),
    ("the key in the environment, as text", b"3f95f09245765f80"),
    ("the key in the environment", &[0x3f, 0x95, 0xf0, 0x92, 0x45, 0x76, 0x5f, 0x80]),
    ("the key of resets, as text", b"4f95f09245765f80"),
    ("the key of resets", &[0x4f, 0x95, 0xf0, 0x92, 0x45, 0x76, 0x5f, 0x80]),
];

const KEY: &str = "95f09245765f80256934e50c66207f";

/// Enough of everything for whatever grows to grow.
fn config() -> String {
    let pools = (0..9).map(|pool| {
        let cids = (0..7).map(|id| {
            let (nonce, key) = match id % 2 {
                0 => (6, format!("key: 1f{KEY}")),
                _ => (14, "key_file: cid.key".to_owned()),
            };
            format!("      - {{ config_id: {id}, server_id_length: 2, nonce_length: {nonce}, {key} }}\n")
        });
        let ids: String = (0..7).map(|id| format!("{id}: \"000{pool}\", ")).collect();
        let backend = format!("{{ name: a, address: \"127.0.0.1:500{pool}\", server_ids: {{ {ids} }} }}");
        format!(
            "  - name: pool-{pool}\n    stateless_reset: {{ key_file: reset.key }}\n    quic_lb:\n{}    \
             backends: [{backend}]\n",
            cids.collect::<String>()
        )
    });
    let keys: String =
        (0..9).map(|n| format!("{{ sequence: {n}, key_env: RETRY_KEY }}, ")).collect();
    format!(
        "listeners: [{{ name: edge, address: \"127.0.0.1:4433\", pool: pool-0 }}]\npools:\n{}retry: \
         {{ mode: always, keys: [{keys}] }}\n",
        pools.collect::<String>()
    )
}

// SAFETY: every call goes on to the system's allocator, which is asked for zeros where anything would do.
unsafe impl GlobalAlloc for Searching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as our caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if SEARCHES.load(SeqCst) {
            // SAFETY: it is `layout.size()` octets that nobody else has any more, and that were zero when they were given out.
            let octets = unsafe { std::slice::from_raw_parts(memory, layout.size()) };
            for (nth, (_, needle)) in NEEDLES.iter().enumerate() {
                if octets.windows(needle.len()).any(|window| window == *needle) {
                    FOUND.fetch_or(1 << nth, SeqCst);
                }
            }
        }
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Searching = Searching;

/// The needles that are in memory which `work` gives back.
fn left_behind_by(work: impl FnOnce()) -> Vec<&'static str> {
    FOUND.store(0, SeqCst);
    SEARCHES.store(true, SeqCst);
    work();
    SEARCHES.store(false, SeqCst);
    let found = FOUND.load(SeqCst);
    let names = NEEDLES.iter().enumerate().filter(|(nth, _)| found & 1 << nth != 0);
    names.map(|(_, (name, _))| *name).collect()
}

#[test]
fn keys_leave_nothing_behind_when_they_are_dropped() {
    let octets = NEEDLES[1].1;
    let kept = left_behind_by(|| drop(octets.to_vec()));
    assert_eq!(kept, [NEEDLES[1].0], "what is left behind is found");

    let folder = tempfile::tempdir().expect("a folder");
    let write =
        |name: &str, text: String| fs::write(folder.path().join(name), text).expect("a file");
    write("lb.yaml", config());
    write("cid.key", format!("2f{KEY}\n"));
    write("reset.key", format!("4f{KEY}\n"));
    let path = folder.path().join("lb.yaml");
    let environment =
        |name: &str| (name == "RETRY_KEY").then(|| "3f95f09245765f80256934e50c66207f".to_owned());
    let surroundings =
        Surroundings { environment: &environment, ..Surroundings::of_file("lb.yaml", &path) };

    let kept = left_behind_by(|| {
        let text = read_text(&path).expect("a text");
        let config = from_str(&text, &surroundings).expect("a configuration").config;
        drop(text);
        let another = config.clone();
        assert_eq!(config.digest(), another.digest());
        let shown = format!("{config:?}{}", another.masked_document());
        assert!(shown.contains("masked"));
        drop(config);
        drop(read_reset_secret(&folder.path().join("reset.key")).expect("a secret"));
    });
    assert_eq!(kept, [""; 0]);

    // Mistakes are shown with the lines that they are in.
    let kept = left_behind_by(|| {
        let mut text = read_text(&path).expect("a text");
        text.push_str("wrong: ");
        let report = from_str(&text, &surroundings).expect_err("a mistake");
        assert!(report.excerpts(false).contains("wrong"));
    });
    assert_eq!(kept, [""; 0]);
}
