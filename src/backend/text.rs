//! What engines say, made fit for one line.

/// The longest message passed on, in characters: an engine's may hold whole tensors.
pub const LIMIT: usize = 300;

/// The words of the first lines that `keep` accepts, as one line without control characters, at most [`LIMIT`]
/// characters long. Blank lines do not count.
pub fn one_line(text: &str, lines: usize, keep: impl Fn(&str) -> bool) -> String {
    let lines = text.lines().filter(|line| !line.trim().is_empty()).take(lines);
    let words: Vec<&str> = lines.flat_map(str::split_whitespace).filter(|word| keep(word)).collect();
    let mut line: String = words.join(" ").chars().filter(|c| !c.is_control()).take(LIMIT + 1).collect();
    if let Some((end, _)) = line.char_indices().nth(LIMIT) {
        let last = line[..end].char_indices().next_back().map_or(0, |(at, _)| at);
        line.replace_range(last.., "…");
    }
    line
}

/// [`one_line`] of the first line.
pub fn first_line(text: &str) -> String {
    one_line(text, 1, |_| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_short_and_whole() {
        assert_eq!(first_line("\n  a\tb\u{7} c  \nd"), "a b c");
        assert_eq!(one_line("a /b\n\nc\nd", 2, |word| !word.starts_with('/')), "a c");
        assert_eq!(first_line(&"é".repeat(LIMIT)), "é".repeat(LIMIT));
        assert_eq!(first_line(&"é".repeat(LIMIT + 1)), "é".repeat(LIMIT - 1) + "…");
        assert_eq!(first_line(""), "");
    }
}
