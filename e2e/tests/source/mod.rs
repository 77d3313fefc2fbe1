//! Rust source as text: enough of its grammar to find functions, paths and `unsafe`, for `tidy`.
//!
//! [`SourceFile::code`] is the text with comments, strings and characters blanked, line by line as before, so that braces and
//! words can be looked for without a parser. It refuses to know any rule: those are tables in `tidy.rs`.

use std::path::{Path, PathBuf};

/// The repository: where cargo runs this test, which need not be where it was built.
pub fn root() -> PathBuf {
    let package = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&package).parent().expect("e2e lies in the repository").to_owned()
}

/// Every file that is part of the repository, relative to its root, in order.
pub fn all_files() -> Vec<String> {
    let mut found = Vec::new();
    walk(&root(), "", &mut found);
    found.sort();
    found
}

fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if ["target", ".git", "shared"].contains(&name.as_str()) {
            continue;
        }
        let path = format!("{prefix}{name}");
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => walk(&entry.path(), &format!("{path}/"), found),
            kind if kind.is_file() => found.push(path),
            _ => {}
        }
    }
}

/// Every Rust file of the repository.
pub fn rust_files() -> Vec<SourceFile> {
    let paths = all_files().into_iter().filter(|path| path.ends_with(".rs"));
    let files: Vec<_> = paths
        .map(|path| {
            let text = std::fs::read_to_string(root().join(&path)).unwrap();
            SourceFile::new(path, text)
        })
        .collect();
    assert!(files.len() > 10, "the repository has Rust files");
    files
}

/// One file.
pub struct SourceFile {
    /// From the repository's root.
    pub path: String,
    /// As it is.
    pub text: String,
    /// Without comments, strings and characters; the same lines.
    pub code: String,
    /// The code without what is compiled for tests only.
    product: String,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Where `fn` stands, from 1.
    pub line: usize,
    /// From `fn` to its last brace.
    pub lines: usize,
}

impl SourceFile {
    /// From a file's text.
    pub fn new(path: String, text: String) -> SourceFile {
        let code = blank(&text);
        let tests = ["/tests.rs", "/tests/", "_tests.rs"];
        let product = if tests.iter().any(|part| path.contains(part)) { String::new() } else { without_tests(&code) };
        SourceFile { path, text, code, product }
    }

    /// How many lines.
    pub fn lines(&self) -> usize {
        self.text.lines().count()
    }

    /// Lines of the code (tests aside) with this text, from 1.
    pub fn lines_with<'a>(&'a self, needle: &'a str) -> impl Iterator<Item = usize> + 'a {
        let whole_word = move |line: &str| {
            let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
            let open_left = needle.starts_with(part_of_word);
            line.match_indices(needle).any(|(at, _)| {
                let left = open_left && line[..at].ends_with(part_of_word);
                let right = needle.ends_with(part_of_word) && line[at + needle.len()..].starts_with(part_of_word);
                !left && !right
            })
        };
        self.product.lines().enumerate().filter(move |(_, line)| whole_word(line)).map(|(index, _)| index + 1)
    }

    /// Does this line declare a module of this name?
    pub fn declares_module(&self, line: usize, name: &str) -> bool {
        let line = self.code.lines().nth(line - 1).unwrap_or_default();
        let rest = line.split(&format!("mod {name}")).nth(1).unwrap_or("x").trim_start();
        rest.starts_with(';') || rest.starts_with('{')
    }

    /// First names after `crate::` in the code (tests aside), with their lines; groups in braces are taken apart.
    pub fn crate_paths(&self) -> Vec<(usize, String)> {
        let code = &self.product;
        let mut found = Vec::new();
        for (at, start) in code.match_indices("crate::") {
            if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            let line = code[..at].matches('\n').count() + 1;
            let rest = &code[at + start.len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(group_names(group).into_iter().map(|name| (line, name))),
                None => found.push((line, identifier(rest))),
            }
        }
        found
    }

    /// Functions with bodies, nested ones too.
    pub fn functions(&self) -> Vec<Function> {
        let code = &self.code;
        let starts = code
            .match_indices("fn ")
            .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
        let function = |(at, _): (usize, &str)| {
            let name = identifier(code[at + 3..].trim_start());
            let body = body_start(&code[at..]).filter(|_| !name.is_empty())? + at;
            let end = matching_brace(&code[body..])? + body;
            let line = code[..at].matches('\n').count() + 1;
            Some(Function { name, line, lines: code[at..=end].matches('\n').count() + 1 })
        };
        starts.filter_map(function).collect()
    }

    /// Lines with `unsafe`, from 1.
    pub fn unsafe_lines(&self) -> Vec<usize> {
        let lines = self.code.lines().enumerate();
        lines.filter(|(_, line)| words(line).any(|word| word == "unsafe")).map(|(index, _)| index + 1).collect()
    }

    /// Lines with an unsafe block or implementation that no SAFETY note precedes.
    pub fn unargued_unsafe(&self) -> impl Iterator<Item = usize> {
        const NEAR: usize = 8;
        let text: Vec<&str> = self.text.lines().collect();
        let code: Vec<&str> = self.code.lines().collect();
        let mut found = Vec::new();
        for line in self.unsafe_lines() {
            let opens = code[line - 1].split("unsafe").skip(1).any(|rest| {
                let rest = rest.trim_start();
                rest.starts_with('{') || rest.starts_with("impl")
            });
            let near = &text[line.saturating_sub(NEAR)..line];
            if opens && !near.iter().any(|line| line.contains("SAFETY:")) {
                found.push(line);
            }
        }
        found.into_iter()
    }

    /// Is `unsafe` opened by the room that this file is in?
    pub fn parent_opens_unsafe(&self) -> bool {
        let mut folder = Path::new(&self.path).parent();
        while let Some(room) = folder.filter(|room| room.components().count() > 2) {
            let head = std::fs::read_to_string(root().join(room).join("mod.rs")).unwrap_or_default();
            if head.contains("#![allow(unsafe_code") {
                return true;
            }
            folder = room.parent();
        }
        false
    }
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// First names at the top level of `a::x, b, c::{y, z}}`.
fn group_names(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let (mut depth, mut fresh) = (1, true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => fresh = true,
            c if fresh && depth == 1 && !c.is_whitespace() => {
                names.push(identifier(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names
}

/// Where the body of the function begins that `text` starts with; none for a declaration.
fn body_start(text: &str) -> Option<usize> {
    let mut depth = 0i32;
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '{' if depth == 0 => return Some(at),
            ';' if depth == 0 => return None,
            _ => {}
        }
        // A type such as `fn(u8)` inside a longer one.
        if depth < 0 {
            return None;
        }
    }
    None
}

/// Blanks each item under `#[cfg(test)]`; line ends stay.
fn without_tests(code: &str) -> String {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(ATTRIBUTE) {
        let item = at + ATTRIBUTE.len();
        let first = rest[item..].find(['{', ';']).map(|first| item + first);
        let end = match first {
            Some(first) if rest[first..].starts_with('{') => matching_brace(&rest[first..]).map(|end| first + end),
            first => first,
        };
        let end = end.map_or(rest.len(), |end| end + 1);
        out.push_str(&rest[..at]);
        out.extend(rest[at..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[end..];
    }
    out + rest
}

/// Where the brace is closed that `text` starts with.
fn matching_brace(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Blanks comments, strings and characters; line ends stay.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let previous_is_word = out.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let length = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => comment_length(rest),
            '"' => string_length(rest),
            'r' | 'b' | 'c' if !previous_is_word => prefixed_length(rest).unwrap_or(0),
            '\'' => character_length(rest).unwrap_or(0),
            _ => 0,
        };
        if length == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            out.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[length..];
        }
    }
    out
}

/// `/* ... */`, which may nest.
fn comment_length(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// `"..."` with escapes.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// `r"..."`, `r#"..."#`, `b"..."`, `br#"..."#`, `c"..."`, `b'x'`.
fn prefixed_length(text: &str) -> Option<usize> {
    let prefix = text.find(|c: char| !"rbc".contains(c)).filter(|prefix| *prefix <= 2)?;
    let rest = &text[prefix..];
    if rest.starts_with('\'') {
        return Some(prefix + character_length(rest)?);
    }
    let hashes = rest.find(|c: char| c != '#')?;
    if !rest[hashes..].starts_with('"') {
        return None;
    }
    if !text[..prefix].contains('r') {
        return (hashes == 0).then(|| prefix + string_length(rest));
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let body = hashes + 1;
    Some(prefix + body + rest[body..].find(&end)? + end.len())
}

/// `'x'` or `'\n'`; none for a lifetime.
fn character_length(text: &str) -> Option<usize> {
    let mut chars = text.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        chars.next()?;
        return Some(chars.find(|(_, c)| *c == '\'')?.0 + 1);
    }
    chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> SourceFile {
        SourceFile::new("x/src/x.rs".into(), text.into())
    }

    #[test]
    fn text_in_comments_and_strings_is_not_code() {
        let text =
            "a // unsafe {\nb /* { /* } */ { */ c \"}\\\"{\" d r#\"\"}\"# e '{' '\\'' 'a b\"{\" for<'a> br\"}\" f";
        let code = blank(text);
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "b", "c", "d", "e", "'a", "for<'a>", "f"]);
        assert_eq!(code.lines().count(), 2);
    }

    #[test]
    fn functions_are_counted_from_head_to_last_brace() {
        let text = "trait T { fn no_body(a: [u8; 3]); }\nfn one<F: Fn(u8)>(f: F)\nwhere F: X,\n{\n  let s = \"}\";\n  fn two() {}\n}\n";
        let found: Vec<_> = file(text).functions().into_iter().map(|f| (f.name, f.line, f.lines)).collect();
        assert_eq!(found, [("one".to_owned(), 2, 6), ("two".to_owned(), 6, 1)]);
    }

    #[test]
    fn paths_are_found_in_groups_and_outside_of_tests() {
        let text = "use crate::{cpu::{X, memory}, addr};\nlet a = crate::device::Y;\n$crate::boot\n#[cfg(test)]\nuse crate::replay;\n#[cfg(test)]\nmod tests { use crate::journal; }\nuse crate::boot;";
        let found: Vec<_> = file(text).crate_paths();
        let names: Vec<_> = found.iter().map(|(line, name)| (*line, name.as_str())).collect();
        assert_eq!(names, [(1, "cpu"), (1, "addr"), (2, "device"), (8, "boot")]);
    }

    #[test]
    fn unsafe_without_a_note_is_found() {
        let far = "\n".repeat(10);
        let text =
            format!("// SAFETY: a.\nunsafe {{ a() }}\n{far}unsafe {{ b() }}\n// unsafe {{ c() }}\nunsafe fn d() {{}}");
        let file = file(&text);
        assert_eq!(file.unsafe_lines(), [2, 13, 15]);
        assert_eq!(file.unargued_unsafe().collect::<Vec<_>>(), [13]);
    }
}
