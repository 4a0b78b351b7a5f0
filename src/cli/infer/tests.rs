use clap::{CommandFactory, Parser};

use super::*;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

impl std::fmt::Debug for Arguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.model)
    }
}

#[test]
fn arguments_are_consistent() {
    Command::command().debug_assert();
    let parse = |arguments: &[&str]| Command::try_parse_from([&["infer", "m"], arguments].concat());
    for good in [&["-i", "-5"][..], &["-i", "a=1", "-i", "b=2"], &["--timeout", "0"], &["-r", "-"]] {
        assert!(parse(good).is_ok(), "{good:?}");
    }
    for bad in [&["-r", "f", "-i", "1"][..], &["--timeout", "5"], &["--classes", "0"], &["--server", "ftp://a"]] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn addresses() {
    let parse = |text: &str| Address::parse(text).map(|address| address.to_string());
    for (text, expected) in [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("models.example", "http://models.example:8000"),
        ("10.0.0.1:80", "http://10.0.0.1:80"),
        ("grpc://10.0.0.1", "grpc://10.0.0.1:8001"),
        ("grpc://[::1]:9", "grpc://[::1]:9"),
        ("http://[::1]", "http://[::1]:8000"),
    ] {
        assert_eq!(parse(text), Ok(expected.to_string()), "{text}");
    }
    for bad in ["", "http://", "https://a", "ftp://a", "http://a/b", "http://a:b", "http://a:", "http://a:70000"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    assert!(parse("http://user:secret@a").is_err_and(|error| !error.contains("secret")));
    assert!(Address::parse("http://localhost:8000").unwrap().is_default());
    assert_eq!(Address::parse("grpc://[::1]:9").unwrap().origin().unwrap().to_string(), "http://[::1]:9/");
}
