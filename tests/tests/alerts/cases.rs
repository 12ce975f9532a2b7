//! When each alert has to fire, and when not: what its metrics show while all is well, during a fault, and after it.

/// How long all is well, how long the fault lasts, and how long it is looked at what follows, in seconds.
pub(crate) const PHASES: [u32; 3] = [1_200, 2_400, 2_400];

/// One fault.
pub(crate) struct Case {
    /// The alert that fires.
    pub(crate) alert: &'static str,
    /// What the fault is.
    pub(crate) fault: &'static str,
    /// What differs from [`WELL`].
    pub(crate) series: &'static [(&'static str, Shape)],
    /// So many seconds after the fault begins it does not fire yet, and so many after it, it does.
    pub(crate) fires: [u32; 2],
    /// So many seconds after the fault ends it does not fire any more.
    pub(crate) ends: u32,
    /// What else may fire then.
    pub(crate) besides: &'static [&'static str],
}

/// What a metric shows.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    /// These values in the three phases.
    Level([f64; 3]),
    /// A counter that grows by so much a second in them.
    Rate([f64; 3]),
    /// 1 for the first so many seconds of a period of so many during the fault, else 0.
    Pulse { on: u32, of: u32 },
    /// 0 in those seconds of the fault, else 1.
    Gap { off: u32, of: u32 },
    /// 1 after the first so many seconds of a period of so many during the fault, else 0.
    Late { off: u32, of: u32 },
    /// Nothing during the fault, else this value.
    Absent(f64),
}

use Shape::{Absent, Gap, Late, Level, Pulse, Rate};

/// A case with what most have in common.
const fn case(
    alert: &'static str,
    fault: &'static str,
    fires: [u32; 2],
    ends: u32,
    series: &'static [(&'static str, Shape)],
) -> Case {
    Case { alert, fault, series, fires, ends, besides: &[] }
}

impl Case {
    const fn besides(mut self, others: &'static [&'static str]) -> Self {
        self.besides = others;
        self
    }
}

const ALWAYS: Shape = Level([1.; 3]);
const NEVER: Shape = Level([0.; 3]);

/// What a fleet of two balancers shows that is well.
pub(crate) const WELL: &[(&str, Shape)] = &[
    (r#"up{job="quic-lb",instance="one"}"#, ALWAYS),
    (r#"up{job="quic-lb",instance="two"}"#, ALWAYS),
    (r#"quic_lb_ready{instance="one"}"#, ALWAYS),
    (r#"quic_lb_ready{instance="two"}"#, ALWAYS),
    (r#"quic_lb_config_info{instance="one",digest="d1"}"#, ALWAYS),
    (r#"quic_lb_config_info{instance="two",digest="d1"}"#, ALWAYS),
    (r#"quic_lb_config_last_reload_successful{instance="one"}"#, ALWAYS),
    (r#"quic_lb_config_reloads_total{instance="one",result="hung"}"#, NEVER),
    (r#"quic_lb_workers_stuck{instance="one"}"#, NEVER),
    (r#"quic_lb_worker_panics_total{instance="one",worker="0"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="active"}"#, ALWAYS),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="probing"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="down"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="miswired"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="draining"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="active"}"#, ALWAYS),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="probing"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="down"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="miswired"}"#, NEVER),
    (r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="draining"}"#, NEVER),
    (r#"quic_lb_pool_panic{instance="one",pool="web"}"#, NEVER),
    (
        r#"quic_lb_backend_checks_total{instance="one",pool="web",backend="a",result="answered"}"#,
        Rate([1.; 3]),
    ),
    (
        r#"quic_lb_backend_checks_total{instance="one",pool="web",backend="a",result="unsent"}"#,
        NEVER,
    ),
    (r#"quic_lb_backend_datagrams_total{instance="one",pool="web",backend="a"}"#, Rate([10.; 3])),
    (
        r#"quic_lb_backend_returned_datagrams_total{instance="one",pool="web",backend="a"}"#,
        Rate([10.; 3]),
    ),
    // What comes from the Internet to any port.
    (
        r#"quic_lb_datagrams_dropped_total{instance="one",listener="edge",reason="malformed"}"#,
        Rate([5.; 3]),
    ),
    (
        r#"quic_lb_datagrams_dropped_total{instance="one",listener="edge",reason="flow_limit"}"#,
        NEVER,
    ),
    (r#"quic_lb_datagrams_dropped_total{instance="one",listener="edge",reason="loop"}"#, NEVER),
    (r#"quic_lb_receive_dropped_total{instance="one",listener="edge",worker="0"}"#, NEVER),
    (r#"quic_lb_return_failed_total{instance="one",listener="edge"}"#, NEVER),
    (r#"quic_lb_flows{instance="one",listener="edge"}"#, Level([100.; 3])),
    (r#"quic_lb_flow_limit{instance="one"}"#, Level([1_000.; 3])),
    (r#"quic_lb_flows_unproven{instance="one"}"#, Level([10.; 3])),
    (r#"quic_lb_remembered{instance="one",table="cid"}"#, Level([100.; 3])),
    (r#"quic_lb_remembered_limit{instance="one",table="cid"}"#, Level([1_000.; 3])),
    (r#"quic_lb_retry_tokens_total{instance="one",result="valid"}"#, Rate([10.; 3])),
    (r#"quic_lb_retry_tokens_total{instance="one",result="expired"}"#, NEVER),
    (r#"quic_lb_retry_tokens_total{instance="one",result="future"}"#, NEVER),
    (r#"quic_lb_retry_unfinished_total{instance="one"}"#, Rate([0.1; 3])),
    (r#"quic_lb_retry_unsupported{instance="one",pool="web",backend="a"}"#, NEVER),
    (r#"quic_lb_retry_switches_total{instance="one",listener="edge",reason="rate"}"#, NEVER),
    (r#"quic_lb_retry_key_tokens{instance="one",sequence="7"}"#, Level([10.; 3])),
    (r#"quic_lb_retry_key_tokens{instance="two",sequence="7"}"#, Level([10.; 3])),
    (r#"quic_lb_retry_key_token_limit{instance="one",sequence="7"}"#, Level([1_000.; 3])),
    (r#"quic_lb_retry_key_token_limit{instance="two",sequence="7"}"#, Level([1_000.; 3])),
    (r#"quic_lb_clock_skew_seconds{instance="one",pool="web",backend="a"}"#, Level([-1., 1., 0.])),
    (r#"quic_lb_connection_log_dropped_total{instance="one",reason="queue"}"#, NEVER),
    (r#"backend_sim_address_tokens_total{instance="origin",result="retry"}"#, Rate([1.; 3])),
    (r#"backend_sim_address_tokens_total{instance="origin",result="unknown_key"}"#, NEVER),
];

/// At least one for each alert.
pub(crate) const CASES: &[Case] = &[
    case(
        "QuicLbGone",
        "a balancer is gone",
        [50, 90],
        30,
        &[(r#"up{job="quic-lb",instance="one"}"#, Level([1., 0., 1.]))],
    ),
    case(
        "QuicLbNotReady",
        "a balancer drains for long",
        [285, 330],
        30,
        &[(r#"quic_lb_ready{instance="one"}"#, Level([1., 0., 1.]))],
    ),
    case(
        "QuicLbNoneReady",
        "all balancers drain",
        [50, 90],
        30,
        &[
            (r#"quic_lb_ready{instance="one"}"#, Level([1., 0., 1.])),
            (r#"quic_lb_ready{instance="two"}"#, Level([1., 0., 1.])),
        ],
    )
    .besides(&["QuicLbNotReady"]),
    case(
        "QuicLbPoolEmpty",
        "all backends of a pool are down, and each is tried now and then",
        [50, 90],
        30,
        &[
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="active"}"#,
                Level([1., 0., 1.]),
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="down"}"#,
                Pulse { on: 40, of: 50 },
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="probing"}"#,
                Late { off: 40, of: 50 },
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="active"}"#,
                Level([1., 0., 1.]),
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="down"}"#,
                Pulse { on: 40, of: 70 },
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="b",state="probing"}"#,
                Late { off: 40, of: 70 },
            ),
        ],
    )
    .besides(&["QuicLbBackendDown"]),
    case(
        "QuicLbPoolPanic",
        "most backends fail their checks",
        [50, 90],
        30,
        &[(r#"quic_lb_pool_panic{instance="one",pool="web"}"#, Level([0., 1., 0.]))],
    ),
    case(
        "QuicLbBackendDown",
        "a backend is down, and is tried now and then",
        [50, 90],
        30,
        &[
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="active"}"#,
                Level([1., 0., 1.]),
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="down"}"#,
                Pulse { on: 40, of: 50 },
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="probing"}"#,
                Late { off: 40, of: 50 },
            ),
        ],
    ),
    case(
        "QuicLbChecksBlind",
        "checks cannot be sent",
        [240, 360],
        330,
        &[(
            r#"quic_lb_backend_checks_total{instance="one",pool="web",backend="a",result="unsent"}"#,
            Rate([0., 1., 0.]),
        )],
    ),
    case(
        "QuicLbBackendMiswired",
        "a backend has another's server ID, and is tried now and then",
        [50, 90],
        30,
        &[
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="active"}"#,
                Level([1., 0., 1.]),
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="miswired"}"#,
                Pulse { on: 40, of: 50 },
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="probing"}"#,
                Late { off: 40, of: 50 },
            ),
        ],
    ),
    case(
        "QuicLbBackendFlapping",
        "a backend comes and goes",
        [60, 700],
        930,
        &[
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="active"}"#,
                Gap { off: 60, of: 120 },
            ),
            (
                r#"quic_lb_backend_state{instance="one",pool="web",backend="a",state="down"}"#,
                Pulse { on: 60, of: 120 },
            ),
        ],
    )
    .besides(&["QuicLbBackendDown"]),
    case(
        "QuicLbBackendSilent",
        "a backend answers nothing",
        [500, 690],
        60,
        &[(
            r#"quic_lb_backend_returned_datagrams_total{instance="one",pool="web",backend="a"}"#,
            Rate([10., 0., 10.]),
        )],
    ),
    case(
        "QuicLbDropping",
        "datagrams find no flow",
        [285, 700],
        330,
        &[(
            r#"quic_lb_datagrams_dropped_total{instance="one",listener="edge",reason="flow_limit"}"#,
            Rate([0., 5., 0.]),
        )],
    ),
    case(
        "QuicLbWorkerPanicked",
        "a worker panics now and then",
        [0, 330],
        630,
        &[(r#"quic_lb_worker_panics_total{instance="one",worker="0"}"#, Rate([0., 1. / 256., 0.]))],
    ),
    case(
        "QuicLbWorkerStuck",
        "a worker is stuck",
        [0, 30],
        30,
        &[(r#"quic_lb_workers_stuck{instance="one"}"#, Level([0., 1., 0.]))],
    ),
    case(
        "QuicLbLoop",
        "datagrams go round",
        [0, 60],
        330,
        &[(
            r#"quic_lb_datagrams_dropped_total{instance="one",listener="edge",reason="loop"}"#,
            Rate([0., 0.5, 0.]),
        )],
    ),
    case(
        "QuicLbValidating",
        "validation begins again and again",
        [0, 330],
        330,
        &[(
            r#"quic_lb_retry_switches_total{instance="one",listener="edge",reason="rate"}"#,
            Rate([0., 1. / 128., 0.]),
        )],
    ),
    case(
        "QuicLbTokenKeyUsed",
        "two balancers use a key up",
        [0, 30],
        30,
        &[
            (r#"quic_lb_retry_key_tokens{instance="one",sequence="7"}"#, Level([10., 300., 10.])),
            (r#"quic_lb_retry_key_tokens{instance="two",sequence="7"}"#, Level([10., 300., 10.])),
        ],
    ),
    case(
        "QuicLbTokensRefused",
        "tokens are of the future",
        [285, 700],
        330,
        &[(r#"quic_lb_retry_tokens_total{instance="one",result="future"}"#, Rate([0., 5., 0.]))],
    ),
    case(
        "QuicLbTokensRefused",
        "tokens come too late",
        [285, 700],
        330,
        &[(r#"quic_lb_retry_tokens_total{instance="one",result="expired"}"#, Rate([0., 5., 0.]))],
    ),
    case(
        "QuicLbRetryUnsupported",
        "a server does not honour tokens",
        [50, 90],
        30,
        &[(
            r#"quic_lb_retry_unsupported{instance="one",pool="web",backend="a"}"#,
            Level([0., 1., 0.]),
        )],
    ),
    case(
        "QuicLbClockSkew",
        "the clock of a server is behind",
        [285, 330],
        30,
        &[(
            r#"quic_lb_clock_skew_seconds{instance="one",pool="web",backend="a"}"#,
            Level([0., -30., 0.]),
        )],
    ),
    case(
        "QuicLbServersRefuseTokens",
        "servers refuse what was validated",
        [285, 700],
        330,
        &[(r#"quic_lb_retry_unfinished_total{instance="one"}"#, Rate([0.1, 9., 0.1]))],
    ),
    case(
        "QuicLbGarbage",
        "much comes that no client sends",
        [570, 960],
        330,
        &[(
            r#"quic_lb_datagrams_dropped_total{instance="one",listener="edge",reason="malformed"}"#,
            Rate([5., 5_000., 5.]),
        )],
    ),
    case(
        "QuicLbReturnsFail",
        "answers cannot be sent",
        [285, 700],
        330,
        &[(r#"quic_lb_return_failed_total{instance="one",listener="edge"}"#, Rate([0., 5., 0.]))],
    ),
    case(
        "QuicLbFlowLimitNear",
        "flows fill up",
        [285, 330],
        30,
        &[(r#"quic_lb_flows{instance="one",listener="edge"}"#, Level([100., 800., 100.]))],
    ),
    case(
        "QuicLbFlowsUnproven",
        "flows are forged",
        [50, 90],
        30,
        &[(r#"quic_lb_flows_unproven{instance="one"}"#, Level([10., 600., 10.]))],
    ),
    case(
        "QuicLbMemoryNear",
        "what is remembered fills up",
        [285, 330],
        30,
        &[(r#"quic_lb_remembered{instance="one",table="cid"}"#, Level([100., 950., 100.]))],
    ),
    case(
        "QuicLbReceiveDropped",
        "the kernel has no room",
        [285, 700],
        330,
        &[(
            r#"quic_lb_receive_dropped_total{instance="one",listener="edge",worker="0"}"#,
            Rate([0., 5., 0.]),
        )],
    ),
    case(
        "QuicLbConnectionLogDropped",
        "the connection log is too slow",
        [240, 360],
        330,
        &[(
            r#"quic_lb_connection_log_dropped_total{instance="one",reason="queue"}"#,
            Rate([0., 1., 0.]),
        )],
    ),
    case(
        "QuicLbConfigRejected",
        "a file was rejected",
        [0, 30],
        30,
        &[(r#"quic_lb_config_last_reload_successful{instance="one"}"#, Level([1., 0., 1.]))],
    ),
    case(
        "QuicLbConfigUnread",
        "the file cannot be read",
        [0, 330],
        930,
        &[(
            r#"quic_lb_config_reloads_total{instance="one",result="hung"}"#,
            Rate([0., 1. / 128., 0.]),
        )],
    ),
    case(
        "QuicLbConfigsDiffer",
        "a balancer has another file",
        [885, 930],
        330,
        &[
            (r#"quic_lb_config_info{instance="two",digest="d1"}"#, Absent(1.)),
            (r#"quic_lb_config_info{instance="two",digest="d2"}"#, Level([f64::NAN, 1., f64::NAN])),
        ],
    ),
    case(
        "BackendSimTokensRefused",
        "an origin does not know the key",
        [285, 700],
        330,
        &[(
            r#"backend_sim_address_tokens_total{instance="origin",result="unknown_key"}"#,
            Rate([0., 5., 0.]),
        )],
    ),
];
