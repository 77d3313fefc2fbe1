//! Kernels of tests: code in a file that any loader with the PVH protocol starts.

/// An ELF with a PVH note (type 18 of "Xen": the 32-bit entry) that is loaded to `code` and begins there.
pub fn elf(code: u32, contents: &[u8]) -> Vec<u8> {
    let entry = u64::from(code);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64 + 2 * 56, 0);
    (file[16], file[18], file[32], file[54], file[56]) = (2, 62, 64, 56, 2);
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    let mut put = |at: usize, word: u64| file[at..at + 8].copy_from_slice(&word.to_le_bytes());
    let (loaded, note) = (176u64, 176 + contents.len() as u64);
    for (header, kind, offset, bytes) in [(64, 1, loaded, contents.len() as u64), (120, 4, note, 24)] {
        put(header, kind);
        put(header + 8, offset);
        put(header + 24, entry);
        put(header + 32, bytes);
        put(header + 40, bytes);
    }
    file.extend(contents);
    for word in [4u32, 8, 18] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(entry.to_le_bytes());
    file
}
