//! Link-local addresses: the same one is another host on each link, so that they are of use with
//! their link alone, by number or by name; other addresses have none.

use std::net::SocketAddr;

use crate::{
    document::Document,
    leaf::{Endpoint, is_link_local},
    mistake::{Mistakes, Place},
    read::{At, Given},
    surroundings::{Surroundings, interface_file},
    yaml::shown,
};

/// Puts numbers for names of network interfaces, and takes out what cannot be reached or listened at.
pub(super) fn resolve(
    document: &mut Document,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) {
    let mut judge = |endpoint: &mut Option<At<Endpoint>>| {
        if endpoint.as_mut().is_some_and(|at| !has_its_zone(at, surroundings, mistakes)) {
            *endpoint = None;
        }
    };
    let listeners = document.listeners.iter_mut().flat_map(|list| &mut list.value.items);
    listeners.for_each(|listener| judge(&mut listener.value.address));
    let pools = document.pools.iter_mut().flat_map(|list| &mut list.value.items);
    let backends = pools.filter_map(|pool| pool.value.backends.as_mut());
    let backends = backends.flat_map(|list| &mut list.value.items);
    for At { value: backend, .. } in backends {
        judge(&mut backend.address);
        if let Given::Here(at) = &backend.check_address {
            let mut address = Some(at.clone());
            judge(&mut address);
            backend.check_address = address.map_or(Given::Wrong, Given::Here);
        }
    }
    if let Given::Here(admin) = &mut document.admin {
        judge(&mut admin.value.address);
        if let Given::Here(commands) = &mut admin.value.commands
            && let Given::Here(at) = &commands.value.address
        {
            let mut address = Some(at.clone());
            judge(&mut address);
            commands.value.address = address.map_or(Given::Wrong, Given::Here);
        }
    }
}

/// `false` after a mistake.
fn has_its_zone(
    At { value: Endpoint { address, interface }, place }: &mut At<Endpoint>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> bool {
    let (ip, port) = (address.ip(), address.port());
    let SocketAddr::V6(v6) = address else { return true };
    if !is_link_local(ip) {
        if v6.scope_id() == 0 && interface.is_none() {
            return true;
        }
        let found = format!("a zone at {ip}, which is the same host on every link");
        mistakes.error(place, found, format!("\"[{ip}]:{port}\""));
        return false;
    }
    if let Some(name) = interface {
        if let Some(file) = interface_file(name) {
            (surroundings.depends_on)(&file);
        }
        return match (surroundings.interface)(name) {
            Some(number) => {
                v6.set_scope_id(number);
                *interface = None;
                true
            }
            None => {
                no_such_interface(name, &format!("[{ip}%2]:{port}"), place, mistakes);
                false
            }
        };
    }
    if v6.scope_id() == 0 {
        let found = format!("the link-local address {ip} without its zone");
        let expected = format!(
            "\"[{ip}%eth0]:{port}\" or \"[{ip}%2]:{port}\": the name or number of the network \
             interface (`ip link`)"
        );
        mistakes.error(place, found, expected);
        return false;
    }
    true
}

fn no_such_interface(name: &str, example: &str, place: &Place, mistakes: &mut Mistakes) {
    let found = format!("the zone \"{}\", and no network interface of this host", shown(name));
    let expected = format!(
        "the name of an interface that is there, or its number, as in \"{example}\" (`ip link`)"
    );
    mistakes.error(place, found, expected);
}
