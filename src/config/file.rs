//! `tidegate.toml` as written: a table whose leaves become texts with their line.

use toml::de::{DeTable, DeValue};

use super::{File, Given, SETTINGS, Text, settings};
use crate::problem::{Problem, nearest};

/// Reads every known key; a file that cannot be read, unknown keys and values that are no scalar become problems.
pub(super) fn read(file: File, problems: &mut Vec<Problem>) -> Given {
    let File { name, content } = file;
    match content {
        Ok(content) => read_text(&name, &content, problems),
        Err(error) => {
            problems.push(Problem {
                place: name,
                found: format!("no readable file ({error})"),
                expected: "TOML".into(),
            });
            Given::new()
        }
    }
}

fn read_text(name: &str, content: &str, problems: &mut Vec<Problem>) -> Given {
    let mut given = Given::new();
    match DeTable::parse(content) {
        Err(error) => problems.push(Problem {
            place: place(name, content, error.span().map_or(0, |span| span.start), None),
            found: error.message().to_string(),
            expected: "TOML".into(),
        }),
        Ok(table) => Walk { name, content, given: &mut given, problems }.table(table.get_ref(), ""),
    }
    given
}

struct Walk<'a> {
    name: &'a str,
    content: &'a str,
    given: &'a mut Given,
    problems: &'a mut Vec<Problem>,
}

impl Walk<'_> {
    fn table(&mut self, table: &DeTable<'_>, prefix: &str) {
        for (name, value) in table {
            let key = format!("{prefix}{}", name.get_ref());
            let place = place(self.name, self.content, name.span().start, Some(&key));
            match (value.get_ref(), settings::find(&key)) {
                (DeValue::Table(inner), None) if is_section(&key) => self.table(inner, &format!("{key}.")),
                (_, None) => self.problems.push(Problem {
                    place,
                    found: "an unknown key".into(),
                    expected: match nearest(&key, SETTINGS.iter().map(|setting| setting.key)) {
                        Some(known) => format!("a known one; perhaps `{known}`"),
                        None => "one of docs/configuration.md".into(),
                    },
                }),
                (value, Some(setting)) => match scalar(value) {
                    Some(text) => self.given.push((setting, Text { text, place })),
                    None => self.problems.push(Problem {
                        place,
                        found: value.type_str().to_string(),
                        expected: "a string, a number, true or false".into(),
                    }),
                },
            }
        }
    }
}

fn is_section(key: &str) -> bool {
    let prefix = format!("{key}.");
    SETTINGS.iter().any(|setting| setting.key.starts_with(&prefix))
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.as_str().to_string()),
        DeValue::Float(number) => Some(number.as_str().to_string()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        _ => None,
    }
}

/// `tidegate.toml:3: http_port`
fn place(name: &str, content: &str, offset: usize, key: Option<&str>) -> String {
    let line = content.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1;
    match key {
        Some(key) => format!("{name}:{line}: {key}"),
        None => format!("{name}:{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(content: &str) -> (Vec<(&'static str, String, String)>, Vec<String>) {
        let mut problems = Vec::new();
        let given = read_text("t.toml", content, &mut problems);
        let given = given.into_iter().map(|(setting, text)| (setting.key, text.text, text.place)).collect();
        (given, problems.iter().map(Problem::to_string).collect())
    }

    #[test]
    fn leaves_become_texts_with_their_line() {
        let (given, problems) = read_all("http_port = 9000\n\n[limits]\nbody = \"1MiB\"\n");
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(given[0], ("http_port", "9000".into(), "t.toml:1: http_port".into()));
        assert_eq!(given[1], ("limits.body", "1MiB".into(), "t.toml:4: limits.body".into()));
    }

    #[test]
    fn every_problem_is_reported() {
        let (given, problems) = read_all("htp_port = 1\nhost = [1]\n[limits]\nbody = true\nbodi = 1\n[nope]\nx = 1\n");
        assert_eq!(given.len(), 1);
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(problems.iter().any(|p| p.contains("perhaps `http_port`")), "{problems:?}");
        let (_, problems) = read_all("a = \n");
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("t.toml:1"), "{problems:?}");
    }
}
