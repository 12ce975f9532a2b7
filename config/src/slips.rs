//! What was meant by a word that is none: slips of the finger, and words cut short or drawn out.

/// The word of `known` that is meant by `found`, if one is close enough.
pub(crate) fn closest<'a>(
    found: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // Longer texts are no slip of a finger, and comparing costs the product of the lengths.
    const MAX_LEN: usize = 40;
    if found.len() > MAX_LEN {
        return None;
    }
    let known = known.into_iter().filter(|name| name.len() <= MAX_LEN);
    let (distance, name) = known.map(|name| (distance(found, name), name)).min()?;
    (distance <= 1 + name.len() / 5).then_some(name)
}

/// How far the one is from the other; one that goes on where the other ends is close to it.
fn distance(found: &str, name: &str) -> usize {
    let (found, name) = (plain(found), plain(name));
    let common = found.iter().zip(&name).take_while(|(a, b)| a == b).count();
    let shorter = found.len().min(name.len());
    if common >= 3 && common + 2 >= shorter && 2 * common >= name.len() {
        return slips(&found, &name).min(1);
    }
    slips(&found, &name)
}

/// Spelling with capitals and hyphens costs nothing.
fn plain(text: &str) -> Vec<char> {
    text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// How many letters have to be changed, added or taken away; two that changed places are one slip.
fn slips(found: &[char], name: &[char]) -> usize {
    let mut before: Vec<usize> = vec![];
    let mut row: Vec<usize> = (0..=name.len()).collect();
    for (nth, a) in found.iter().enumerate() {
        let mut next = vec![nth + 1];
        for (column, b) in name.iter().enumerate() {
            let changed = row[column] + usize::from(a != b);
            let mut least = changed.min(row[column + 1] + 1).min(next[column] + 1);
            if nth > 0 && column > 0 && found[nth - 1] == *b && name[column - 1] == *a {
                least = least.min(before[column - 1] + 1);
            }
            next.push(least);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_recognized() {
        let known = ["name", "address", "server_id", "server_ids"];
        for (found, meant) in [
            ("adress", Some("address")),
            ("Name", Some("name")),
            ("serverId", Some("server_id")),
            ("server-ids", Some("server_ids")),
            ("nmae", Some("name")),
            ("nmae2", None),
            ("port", None),
            ("", None),
        ] {
            assert_eq!(closest(found, known), meant, "{found}");
        }
    }

    #[test]
    fn words_cut_short_or_drawn_out_are_recognized() {
        let known = ["error", "warn", "info", "debug", "trace", "draining", "active"];
        for (found, meant) in [
            ("warning", Some("warn")),
            ("WARN", Some("warn")),
            ("err", Some("error")),
            ("information", Some("info")),
            ("drained", Some("draining")),
            ("drain", Some("draining")),
            ("verbose", None),
            ("de", None),
        ] {
            assert_eq!(closest(found, known), meant, "{found}");
        }
        assert_eq!(closest("wbe", ["api", "web"]), Some("web"));
    }
}
