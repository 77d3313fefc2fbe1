//! Names of addresses from an ELF file that somebody gives.

use node_agent::replay::symbols::Symbols;
use proptest::prelude::*;

const SYMBOL_BYTES: usize = 24;
const HEADER_BYTES: usize = 64;
const SECTION_SYMBOLS: u32 = 2;

/// An ELF file with these symbols.
pub fn elf(symbols: &[(&str, u64, u64)]) -> Vec<u8> {
    let (mut names, mut table) = (vec![0], vec![0; SYMBOL_BYTES]);
    for (name, address, bytes) in symbols {
        table.extend((names.len() as u32).to_le_bytes());
        table.extend([2, 0, 1, 0]);
        table.extend(address.to_le_bytes());
        table.extend(bytes.to_le_bytes());
        names.extend(name.as_bytes());
        names.push(0);
    }
    let mut file = vec![0; HEADER_BYTES];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let header = |kind: u32, link: u32, offset: usize, bytes: usize| {
        let mut header = vec![0; 64];
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        header[40..44].copy_from_slice(&link.to_le_bytes());
        header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(bytes as u64).to_le_bytes());
        header
    };
    let headers = [
        header(0, 0, 0, 0),
        header(SECTION_SYMBOLS, 2, HEADER_BYTES, table.len()),
        header(3, 0, HEADER_BYTES + table.len(), names.len()),
    ];
    file.extend(&table);
    file.extend(&names);
    let at = file.len() as u64;
    file[40..48].copy_from_slice(&at.to_le_bytes());
    file[60..62].copy_from_slice(&3u16.to_le_bytes());
    headers.iter().for_each(|header| file.extend(header));
    file
}

#[test]
fn symbols_are_found_by_name_and_by_address() {
    let symbols = Symbols::parse(&elf(&[("later", 0x2000, 0), ("first", 0x1000, 0x10)])).unwrap();
    assert_eq!(symbols.address("first"), Some((0x1000, 0x10)));
    assert_eq!(symbols.address("nowhere"), None);
    assert_eq!(symbols.name(0x1000).as_deref(), Some("first"));
    assert_eq!(symbols.name(0x100f).as_deref(), Some("first+0xf"));
    assert_eq!((symbols.name(0x1010), symbols.name(0xfff)), (None, None));
    assert_eq!(symbols.name(0x2345).as_deref(), Some("later+0x345"));
    assert_eq!(Symbols::parse(b"\x7fELF\x01\x01"), None);
}

proptest! {
    #[test]
    fn no_file_panics(at in 0usize..300, value: u64, cut in 0usize..400) {
        let mut file = elf(&[("a", 1, 2), ("b", 3, 4)]);
        let at = at.min(file.len() - 8);
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        file.truncate(cut.max(1));
        let _ = Symbols::parse(&file);
    }
}
