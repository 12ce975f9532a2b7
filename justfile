# One command for each task. `just` is a convenience: nothing depends on it, and each line can be typed.

set positional-arguments

# These recipes.
default:
    @just --list --unsorted

# Format, lints and the tests inside of the crates: before every commit, under three minutes after a build.
quick:
    .ci/run quick

# Every test that needs no privileges, or those whose name has NAME in it.
test NAME='':
    cargo test --workspace {{ NAME }}

# The whole gate, as a fresh machine runs it; as root with the suite of namespaces.
gate:
    .ci/run

# One benchmark: cid, token, decide, datapath, flood, fleet or transport. `just bench datapath --scale`
bench NAME *ARGS:
    cargo bench --workspace --bench {{ NAME }} -- {{ ARGS }}

# Every fuzz target for ten seconds, or one for as long as FUZZ_SECONDS says.
fuzz TARGET='':
    .ci/run fuzz {{ TARGET }}

# Real NATs in network namespaces (needs root). `just netns --only 'NAME'`
netns *ARGS:
    tests/netns/run "$@"

# Foreign peers through the balancer. `just peers --write` puts the table into docs/peers.md.
peers *ARGS:
    tests/peers/run "$@"

# Breaks the transport in the ways that its tests have to notice, one at a time.
mutations *NAMES:
    tests/mutations/run "$@"

# Breaks lines by machine, a part of all (docs/mutants.md). `just mutants quic-lb 3/10`
mutants PACKAGE='quic' SHARD='0/10':
    cargo mutants -p {{ PACKAGE }} --shard {{ SHARD }}

# A balancer, servers and moving clients in one process.
demo *ARGS:
    cargo run --release -- demo "$@"

# The documentation of all crates; warnings are errors.
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --all-features --no-deps
