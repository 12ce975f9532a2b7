//! The admin interface: where it is, and who may command.

use zeroize::Zeroizing;

use super::{tls, unique::check_unique};
use crate::{
    checked::{Admin, BearerToken, Commands},
    document::{self, Document},
    file,
    leaf::Text,
    mistake::{Mistakes, Place},
    read::{At, Given},
    surroundings::Surroundings,
    system_error::reason,
    yaml::shown,
};

/// What the name of a Unix socket may have, in bytes: a little less than the kernel takes, since it has another one at first.
const MAX_SOCKET_NAME: usize = 100;

/// Nobody guesses so much.
const MIN_TOKEN: usize = 16;
const MAX_TOKEN: usize = 4096;

pub(super) fn check_admin(
    document: &Document,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Admin> {
    let admin = &document.admin.here()?.value;
    let host_names = match &admin.host_names {
        Given::Here(names) => names.value.items.as_slice(),
        Given::Absent | Given::Wrong => &[],
    };
    check_unique(host_names.iter().map(|at| (&at.value.0, at)), "name", mistakes);
    let commands = match &admin.commands {
        Given::Here(At { value, place }) => check_commands(value, place, surroundings, mistakes),
        Given::Absent | Given::Wrong => None,
    };
    let At { value, place } = admin.address.as_ref()?;
    let address = value.address;
    if !address.ip().is_loopback() {
        let found = format!("{address}, which other hosts may reach");
        mistakes.warning(
            place,
            found,
            "a loopback address: the admin interface asks for no password",
        );
    }
    let host_names = host_names.iter().map(|at| at.value.0.clone()).collect();
    Some(Admin { address, host_names, commands })
}

fn check_commands(
    commands: &document::Commands,
    place: &Place,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Commands> {
    let document::Commands { unix, address, token_file, .. } = commands;
    let document::Commands { cert_file, key_file, client_ca_file, .. } = commands;
    let of_tls = [cert_file, key_file, client_ca_file];
    if of_tls.iter().any(|file| !file.is_absent()) {
        return check_tls(commands, of_tls, place, surroundings, mistakes);
    }
    match (unix, address, token_file) {
        (Given::Here(At { value: Text(name), place }), Given::Absent, Given::Absent) => {
            let path = surroundings.directory.join(name);
            let len = path.as_os_str().len();
            if name.is_empty() || len > MAX_SOCKET_NAME {
                let found = format!("a path of {len} bytes");
                mistakes.error(place, found, format!("1 to {MAX_SOCKET_NAME} bytes"));
                return None;
            }
            Some(Commands::Unix(path))
        }
        (Given::Absent, Given::Here(address), Given::Here(file)) => {
            let token = read_token(file, surroundings, mistakes)?;
            let At { value, place } = address;
            let address = value.address;
            if !address.ip().is_loopback() {
                let found = format!("{address}, where the token passes in the clear");
                mistakes.warning(place, found, "a loopback address, or a network of your own");
            }
            Some(Commands::Token(address, token))
        }
        (Given::Wrong, ..) | (_, Given::Wrong, _) | (.., Given::Wrong) => None,
        _ => {
            let found = "neither a Unix socket nor an address with its token";
            let expected = "`unix`, or `address` and `token_file`, or `address`, `cert_file`, `key_file` and `client_ca_file`";
            mistakes.error(place, found, expected);
            None
        }
    }
}

fn check_tls(
    document::Commands { unix, address, token_file, .. }: &document::Commands,
    of_tls: [&Given<Text>; 3],
    place: &Place,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Commands> {
    if !unix.is_absent() || !token_file.is_absent() {
        let found = "files of TLS beside `unix` or `token_file`";
        mistakes.error(place, found, "one way to take commands");
        return None;
    }
    match (address, of_tls) {
        (Given::Here(address), [Given::Here(cert), Given::Here(key), Given::Here(ca)]) => {
            let tls = tls::server_tls([cert, key, ca], surroundings, mistakes)?;
            Some(Commands::Certificates(address.value.address, tls))
        }
        (Given::Absent, _) => {
            mistakes.error(place, "files of TLS without an `address`", "`address`");
            None
        }
        (_, files) if files.iter().any(|file| file.is_absent()) => {
            let found = "some of the files of TLS";
            mistakes.error(place, found, "`cert_file`, `key_file` and `client_ca_file`");
            None
        }
        _ => None,
    }
}

pub(super) fn read_token(
    At { value: Text(name), place }: &At<Text>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<BearerToken> {
    let path = surroundings.directory.join(name);
    (surroundings.depends_on)(&path);
    let file = format!("\"{}\"", shown(name));
    let content = match file::read(&path, MAX_TOKEN as u64 + 2) {
        Ok(content) => content,
        Err(error) => {
            let found = format!("{file}, which cannot be read: {}", reason(&error));
            mistakes.error(place, found, "a file with a token that this process may read");
            return None;
        }
    };
    let text = file::into_text(content).ok();
    let token = text.as_deref().map(|text| text.trim());
    let is_good = |token: &&str| {
        (MIN_TOKEN..=MAX_TOKEN).contains(&token.len())
            && token.bytes().all(|octet| octet.is_ascii_graphic())
    };
    let Some(token) = token.filter(is_good) else {
        let found = format!("{file}, which holds no token");
        let expected = format!("{MIN_TOKEN} to {MAX_TOKEN} characters without spaces");
        mistakes.error(place, found, expected);
        return None;
    };
    Some(BearerToken::new(name.clone(), Zeroizing::new(token.to_owned())))
}
