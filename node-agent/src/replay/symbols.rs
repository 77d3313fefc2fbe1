//! Names of addresses from an ELF file, such as a vmlinux: the symbol table alone, read as hostile input. It refuses to
//! know debug information and relocation: a kernel that was loaded elsewhere than it was linked has other addresses.

/// Most symbols that are kept.
const SYMBOLS_MAX: usize = 4 << 20;
const SECTION_SYMBOLS: u32 = 2;
const HEADER_BYTES: usize = 64;
const SECTION_BYTES: u64 = 64;
const SYMBOL_BYTES: usize = 24;

/// One symbol.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Symbol {
    address: u64,
    bytes: u64,
    name: String,
}

/// Symbols of one file, in order of address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Symbols {
    by_address: Vec<Symbol>,
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Name, type, link, offset and size of a section header.
fn section(file: &[u8], table: u64, number: u64) -> Option<(u32, u32, &[u8])> {
    let at = usize::try_from(table.checked_add(number.checked_mul(SECTION_BYTES)?)?).ok()?;
    let (kind, link) = (word(file, at.checked_add(4)?)?, word(file, at.checked_add(40)?)?);
    let (offset, bytes) = (long(file, at.checked_add(24)?)?, long(file, at.checked_add(32)?)?);
    let (start, end) = (usize::try_from(offset).ok()?, usize::try_from(offset.checked_add(bytes)?).ok()?);
    // Sections without bytes in the file have a size of their own.
    Some((kind, link, file.get(start..end).unwrap_or_default()))
}

impl Symbols {
    /// Reads a 64-bit little-endian ELF file; `None` if it is none, or has no symbols.
    pub fn parse(file: &[u8]) -> Option<Symbols> {
        if file.len() < HEADER_BYTES || !file.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let (table, count) = (long(file, 40)?, u64::from(half(file, 60)?));
        let mut by_address = Vec::new();
        for number in 0..count {
            let Some((SECTION_SYMBOLS, link, symbols)) = section(file, table, number) else { continue };
            let Some((_, _, names)) = section(file, table, link.into()) else { continue };
            for entry in symbols.chunks_exact(SYMBOL_BYTES) {
                if by_address.len() == SYMBOLS_MAX {
                    break;
                }
                by_address.extend(symbol(entry, names));
            }
        }
        by_address.sort_by(|a: &Symbol, b| (a.address, &a.name).cmp(&(b.address, &b.name)));
        (!by_address.is_empty()).then_some(Symbols { by_address })
    }

    /// Address and length of a symbol; the length is 0 if the file does not say.
    pub fn address(&self, name: &str) -> Option<(u64, u64)> {
        self.by_address.iter().find(|symbol| symbol.name == name).map(|symbol| (symbol.address, symbol.bytes))
    }

    /// `name+0x1c` for an address.
    pub fn name(&self, address: u64) -> Option<String> {
        let at = self.by_address.partition_point(|symbol| symbol.address <= address).checked_sub(1)?;
        let symbol = &self.by_address[at];
        let distance = address - symbol.address;
        let inside = if symbol.bytes == 0 { distance < 1 << 20 } else { distance < symbol.bytes };
        inside.then(|| if distance == 0 { symbol.name.clone() } else { format!("{}+{distance:#x}", symbol.name) })
    }
}

/// Functions, objects and untyped labels that are defined.
fn symbol(entry: &[u8], names: &[u8]) -> Option<Symbol> {
    let kind = entry[4] & 0xf;
    let (name, home) = (word(entry, 0)? as usize, half(entry, 6)?);
    if kind > 2 || home == 0 {
        return None;
    }
    let name = names.get(name..)?;
    let end = name.iter().take(512).position(|byte| *byte == 0)?;
    let name = std::str::from_utf8(&name[..end]).ok().filter(|name| !name.is_empty())?;
    Some(Symbol { address: long(entry, 8)?, bytes: long(entry, 16)?, name: name.to_owned() })
}
