//! Builds routing snapshots beside the thread of the control plane, which goes on answering
//! meanwhile: one at a time, each of what is wanted when it begins.

use std::sync::Arc;

use tokio::task;
use tracing::error;

use super::shared::Shared;

/// Builds for as long as the process lives.
pub(super) async fn build(shared: Arc<Shared>) {
    loop {
        shared.changed().await;
        build_newest(&shared).await;
        let digest = shared.plane().digest_to_find();
        if let Some(digest) = digest
            && let Err(error) = task::spawn_blocking(digest).await
        {
            error!(%error, "the digest of the configuration was not found");
        }
    }
}

/// Builds until what is wanted is in force.
async fn build_newest(shared: &Shared) {
    loop {
        let order = shared.plane().order();
        let Some(order) = order else { return };
        match task::spawn_blocking(move || order.build()).await {
            Ok(built) => shared.install(built),
            // The snapshot in force stays so, and the next change is tried again.
            Err(error) => return error!(%error, "the routing snapshot was not built"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        pin::{Pin, pin},
        task::{Context, Poll, Waker},
        time::Instant,
    };

    use axum::{
        Router,
        body::Body,
        http::{Method, Request, StatusCode, header},
    };
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;
    use quic_lb_config::Config;

    use super::{
        super::{admin, doors::Access, plane::ControlPlane},
        *,
    };
    use crate::{
        backend::{BackendState, MAX_BACKENDS},
        fixtures,
        memory::Memory,
        worker::{mailbox::Mailboxes, panics::Panics},
    };

    /// As many backends as there can be, in one pool.
    fn large() -> Config {
        let mut config = fixtures::config(false);
        let pool = &mut config.pools[0];
        let backend = pool.backends[0].clone();
        pool.backends = (1..=MAX_BACKENDS)
            .map(|n| {
                let address = SocketAddr::from(([127, 0, 0, 1], u16::try_from(n).unwrap()));
                quic_lb_config::Backend { name: format!("b{n}"), address, ..backend.clone() }
            })
            .collect();
        config
    }

    async fn ask(router: &Router, method: Method, path: &str) -> StatusCode {
        let request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
        let request = request.body(Body::empty()).unwrap();
        TowerToHyperService::new(router.clone()).call(request).await.unwrap().status()
    }

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// One thread runs the admin interface and the builder's task, as in the process. Were the table
    /// filled on that thread, the builder would be done as soon as it had begun.
    #[tokio::test(flavor = "current_thread")]
    async fn the_control_plane_answers_while_a_large_table_is_filled() {
        let memory = Arc::new(Memory::new(100, Instant::now(), [0; 4]));
        let shared = Arc::new(Shared::new(
            ControlPlane::new(large(), memory, [1, 2]),
            Mailboxes::default(),
            Arc::new(Panics::new(0)),
        ));
        let router = admin::router(Arc::clone(&shared), Access::Everything);
        for n in 1..=20 {
            let path = format!("/api/v1/backends/web/b{n}/drain");
            let mut command = pin!(ask(&router, Method::POST, &path));
            assert!(poll(command.as_mut()).is_pending(), "it is answered when it is in force");
            let mut building = pin!(build_newest(&shared));
            if poll(building.as_mut()).is_ready() {
                // Another thread may have filled the table before anybody looked.
                assert_eq!(command.await, StatusCode::OK);
                continue;
            }
            for path in ["/healthz", "/readyz", "/metrics", "/api/v1/backends", "/api/v1/config"] {
                assert_eq!(ask(&router, Method::GET, path).await, StatusCode::OK, "{path}");
            }
            let in_force = shared.plane().in_force();
            assert!(in_force < shared.plane().newest(), "all that came before the snapshot");
            assert!(poll(command.as_mut()).is_pending());
            building.await;
            assert_eq!(command.await, StatusCode::OK);
            let views = shared.plane().views(Instant::now());
            assert_eq!(views[n - 1].state, BackendState::Draining);
            return;
        }
        panic!("tables are filled on the thread that answers");
    }
}
