//! The generated references in docs/ are what the code says; `make bless` rewrites them.

use crate::support::root;

#[allow(clippy::disallowed_methods, reason = "the switch of the test run itself")]
fn compare(file: &str, generated: &str) {
    let path = root().join("docs").join(file);
    if std::env::var_os("TIDEGATE_BLESS").is_some() {
        std::fs::write(&path, generated).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == generated, "docs/{file} is out of date: run `make bless`");
}

#[test]
fn configuration_reference_is_up_to_date() {
    compare("configuration.md", &tidegate::config::reference());
}

#[test]
fn command_line_reference_is_up_to_date() {
    compare("cli.md", &tidegate::cli::reference());
}
