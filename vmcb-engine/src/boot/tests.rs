//! Tests of the boot room on synthetic files, and on a real kernel where `GODWIT_TEST_KERNEL` names one.

use super::layout::{COMMAND_LINE, PAGE_TABLES, START_INFO, ZERO_PAGE};
use super::*;
use crate::cpu::gpr;

const WINDOWS: [Window; 2] =
    [Window { gpa: 0xd000_0000, bytes: 0x1000, line: 5 }, Window { gpa: 0xd000_1000, bytes: 0x1000, line: 6 }];

fn boot<'a>(kernel: &'a [u8], initrd: Option<&'a [u8]>) -> Boot<'a> {
    Boot {
        kernel,
        initrd,
        command_line: "console=ttyS0",
        seed: &[7; 32],
        generation_id: &[9; 16],
        position: 0,
        vcpus: 2,
        windows: &WINDOWS,
    }
}

fn memory() -> GuestMemory {
    GuestMemory::create(64 << 20).unwrap()
}

fn read(memory: &GuestMemory, gpa: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    memory.read(gpa, &mut out).unwrap();
    out
}

fn number(memory: &GuestMemory, gpa: u64, bytes: usize) -> u64 {
    let mut word = [0; 8];
    word[..bytes].copy_from_slice(&read(memory, gpa, bytes));
    u64::from_le_bytes(word)
}

/// A 64-bit ELF: one segment of `code`, and notes.
fn elf(gpa: u64, code: &[u8], notes: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[16] = 2;
    file[18] = 62;
    file[24..32].copy_from_slice(&(gpa + 0x10).to_le_bytes());
    file[32] = 64;
    file[54] = 56;
    file[56] = 2;
    let data = 64 + 2 * 56;
    let rows = [(1u32, data, gpa, code.len(), code.len() + 0x100), (4, data + code.len(), 0, notes.len(), notes.len())];
    for (kind, offset, gpa, file_bytes, memory_bytes) in rows {
        file.extend(kind.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        for word in [offset as u64, u64::MAX - 0xfff, gpa, file_bytes as u64, memory_bytes as u64, 0x1000] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(code);
    file.extend(notes);
    file
}

fn note(kind: u32, name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, value.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(name);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(value);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

fn lz4_legacy(kernel: &[u8]) -> Vec<u8> {
    let mut payload = 0x184c_2102u32.to_le_bytes().to_vec();
    for block in kernel.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        payload.extend((packed.len() as u32).to_le_bytes());
        payload.extend(packed);
    }
    payload.extend((kernel.len() as u32).to_le_bytes());
    payload
}

/// The payload as the kernel's build packs it, by method: xz through the x86 filter, lengths behind all but gzip.
fn packed(kernel: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    use std::io::Write;
    let with_length = |mut packed: Vec<u8>| {
        packed.extend((kernel.len() as u32).to_le_bytes());
        packed
    };
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(kernel).unwrap();
    let mut options = lzma_rust2::XzOptions::with_preset(6);
    options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    xz.write_all(kernel).unwrap();
    let options = lzma_rust2::LzmaOptions::with_preset(6);
    let mut lzma = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
    lzma.write_all(kernel).unwrap();
    vec![
        ("gzip", gzip.finish().unwrap()),
        ("xz", with_length(xz.finish().unwrap())),
        ("lzma", with_length(lzma.finish().unwrap())),
        ("zstd", with_length(zstd::stream::encode_all(kernel, 19).unwrap())),
        ("lz4", lz4_legacy(kernel)),
    ]
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2 * 512 + 0x40];
    file[0x1f1] = 1;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236] = 0x7f;
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&0x40u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x80_0000u32.to_le_bytes());
    file.extend(payload);
    file
}

#[test]
fn a_bzimage_is_unpacked_and_entered_in_64_bits() {
    let memory = memory();
    let kernel = elf(0x100_0000, b"kernel bytes", &[]);
    let initrd = vec![0x1d; 5000];
    let file = bzimage(&lz4_legacy(&kernel));
    let mut first = CpuState::reset();
    load(&memory, &boot(&file, Some(&initrd)), &mut first).unwrap();
    assert_eq!(read(&memory, 0x100_0000, 12), b"kernel bytes");
    assert_eq!((first.rip, first.gprs[gpr::RSI], first.cr3), (0x100_0010, ZERO_PAGE, PAGE_TABLES));
    assert_eq!((first.cr0, first.cr4, first.efer, first.cs.attrib), (0x8000_0011, 0x20, 0x500, 0xa9b));
    assert_eq!(read(&memory, ZERO_PAGE + 0x202, 4), b"HdrS");
    assert_eq!(number(&memory, ZERO_PAGE + 0x210, 1), 0xff);
    assert_eq!(number(&memory, ZERO_PAGE + 0x070, 8), RSDP);
    let address = number(&memory, ZERO_PAGE + 0x218, 4);
    assert_eq!((address, number(&memory, ZERO_PAGE + 0x21c, 4)), ((64 << 20) - 8192, 5000));
    assert_eq!(read(&memory, address, 5000), initrd);
    assert_eq!(number(&memory, ZERO_PAGE + 0x228, 4), COMMAND_LINE);
    assert_eq!(read(&memory, COMMAND_LINE, 14), b"console=ttyS0\0");
    assert_eq!(number(&memory, ZERO_PAGE + 0x1e8, 1), 3);
    let node = number(&memory, ZERO_PAGE + 0x250, 8);
    assert_eq!((number(&memory, node + 8, 4), number(&memory, node + 12, 4)), (9, 32));
    assert_ne!(read(&memory, node + 16, 32), [7; 32], "the guest never sees the machine's own seed");
}

/// Code with calls, which the x86 filter of xz changes, of more than one lz4 block when long.
fn code(bytes: usize) -> Vec<u8> {
    (0..bytes / 5).flat_map(|n| [0xe8, n as u8, (n >> 8) as u8, (n >> 16) as u8 & 0x0f, 0]).collect()
}

#[test]
fn every_packing_unpacks_to_the_same_kernel() {
    let code = code(9 << 20);
    let kernel = elf(0x100_0000, &code, &[]);
    for (method, payload) in packed(&kernel) {
        let memory = memory();
        let mut first = CpuState::reset();
        load(&memory, &boot(&bzimage(&payload), None), &mut first).unwrap_or_else(|e| panic!("{method}: {e}"));
        assert!(read(&memory, 0x100_0000, code.len()) == code, "{method}");
        assert_eq!(first.rip, 0x100_0010, "{method}");
    }
}

#[test]
fn a_payload_that_lies_about_its_length_is_refused() {
    let kernel = elf(0x100_0000, &code(5000), &[]);
    for (method, payload) in packed(&kernel) {
        for length in [0, kernel.len() as u32 - 1, kernel.len() as u32 + 1, 1 << 30, u32::MAX] {
            let mut lying = payload.clone();
            let at = lying.len() - 4;
            lying[at..].copy_from_slice(&length.to_le_bytes());
            assert!(matches!(unpack::unpack(&lying), Err(BootError::Damaged(_))), "{method} {length}");
        }
    }
}

#[test]
fn damaged_payloads_are_refused_and_never_panic() {
    let kernel = elf(0x100_0000, &code(3000), &[]);
    for (method, payload) in packed(&kernel) {
        for cut in 4..payload.len() {
            assert!(unpack::unpack(&payload[..cut]).is_err(), "{method} cut at {cut}");
        }
        for at in 0..payload.len() {
            let mut changed = payload.clone();
            changed[at] ^= 1 << (at % 8);
            // Lz4, lzma and zstd carry no checksum here: they may unpack to something else of that length.
            if let Ok(bytes) = unpack::unpack(&changed) {
                assert_eq!(bytes.len(), kernel.len(), "{method} changed at {at}");
            }
        }
    }
}

#[test]
fn the_first_four_gib_are_mapped_to_themselves() {
    let memory = memory();
    load(&memory, &boot(&elf(0x100_0000, b"x", &[]), None), &mut CpuState::reset()).unwrap();
    let table = |entry: u64| entry & 0x000f_ffff_ffff_f000;
    for address in [0u64, 0x20_0000, 0xfee0_0000, 0xffff_f000] {
        let pointers = table(number(&memory, PAGE_TABLES + 8 * (address >> 39), 8));
        let directory = table(number(&memory, pointers + 8 * (address >> 30 & 511), 8));
        let entry = number(&memory, directory + 8 * (address >> 21 & 511), 8);
        assert_eq!(entry, address & !0x1f_ffff | 0x83);
    }
}

#[test]
fn ram_above_three_gib_is_told_above_the_hole() {
    let memory = GuestMemory::create(5 << 30).unwrap();
    load(&memory, &boot(&elf(0x100_0000, b"x", &[]), Some(&[1; 10])), &mut CpuState::reset()).unwrap();
    assert_eq!(number(&memory, ZERO_PAGE + 0x1e8, 1), 4);
    let row = |n: u64| {
        let at = ZERO_PAGE + 0x2d0 + 20 * n;
        (number(&memory, at, 8), number(&memory, at + 8, 8), number(&memory, at + 16, 4))
    };
    assert_eq!(row(0), (0, 0x9_fc00, 1));
    assert_eq!(row(1), (0x9_fc00, 0x6_0400, 2));
    assert_eq!(row(2), (0x10_0000, (3 << 30) - 0x10_0000, 1));
    assert_eq!(row(3), (4 << 30, 2 << 30, 1));
    assert_eq!(number(&memory, ZERO_PAGE + 0x218, 4), (3 << 30) - 4096);
}

#[test]
fn a_pvh_kernel_is_entered_in_32_bits() {
    let memory = memory();
    let mut notes = note(1, b"GNU\0", &[1, 2, 3, 4, 5]);
    notes.extend(note(18, b"Xen\0", &0x20_0040u32.to_le_bytes()));
    let file = elf(0x20_0000, &[0x90; 100], &notes);
    let mut first = CpuState::reset();
    load(&memory, &boot(&file, Some(b"initrd")), &mut first).unwrap();
    assert_eq!((first.rip, first.gprs[gpr::RBX], first.cr0, first.efer), (0x20_0040, START_INFO, 0x11, 0));
    let words = [0, 4, 12, 48].map(|at| number(&memory, START_INFO + at, 4));
    assert_eq!(words, [0x336e_c578, 1, 1, 3]);
    let module = number(&memory, START_INFO + 16, 8);
    assert_eq!(read(&memory, number(&memory, module, 8), 6), b"initrd");
    assert_eq!(number(&memory, START_INFO + 24, 8), COMMAND_LINE);
    assert_eq!(number(&memory, START_INFO + 32, 8), RSDP);
    let map = number(&memory, START_INFO + 40, 8);
    assert_eq!((number(&memory, map + 48, 8), number(&memory, map + 64, 4)), (0x10_0000, 1));
}

#[test]
fn files_that_are_no_kernel_are_called_by_their_name() {
    let tries: [(&[u8], &str); 6] = [
        (b"", "an empty file"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"070701000", "swapped"),
        (b"<html>", "failed download"),
        (b"\0\0\0\0", "nothing but zeros"),
        (b"\x12\x34", "begins with 12 34"),
    ];
    for (file, name) in tries {
        let error = load(&memory(), &boot(file, None), &mut CpuState::reset()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let file = bzimage(b"BZh9....");
    assert_eq!(load(&memory(), &boot(&file, None), &mut CpuState::reset()), Err(BootError::Compression("bzip2")));
    let mut arm = elf(0x100_0000, b"x", &[]);
    arm[18] = 183;
    let error = load(&memory(), &boot(&arm, None), &mut CpuState::reset()).unwrap_err();
    assert!(error.to_string().contains("machine 183"), "{error}");
}

#[test]
fn what_does_not_fit_says_how_much_memory_it_takes() {
    let small = GuestMemory::create(16 << 20).unwrap();
    let file = bzimage(&lz4_legacy(&elf(0x100_0000, b"kernel", &[])));
    let fail = |memory: &GuestMemory, initrd| load(memory, &boot(&file, initrd), &mut CpuState::reset()).unwrap_err();
    assert_eq!(fail(&small, None), BootError::TooLarge { needed: 24 << 20, memory: 16 << 20 });
    let initrd = vec![0; 60 << 20];
    let memory = memory();
    assert_eq!(fail(&memory, Some(&initrd)), BootError::TooLarge { needed: 84 << 20, memory: 64 << 20 });
    let low = elf(0x8_0000, b"x", &[]);
    let error = load(&memory, &boot(&low, None), &mut CpuState::reset()).unwrap_err();
    assert_eq!(error, BootError::Segment { gpa: 0x8_0000, bytes: 0x101 });
    let long = "x".repeat(3000);
    let boot = Boot { command_line: &long, ..boot(&file, None) };
    let error = load(&memory, &boot, &mut CpuState::reset()).unwrap_err();
    assert_eq!(error, BootError::CommandLine { bytes: 3000, max: 2047 });
}

#[test]
fn damaged_files_never_panic() {
    let whole = bzimage(&lz4_legacy(&elf(0x100_0000, &[0x5a; 3000], &note(18, b"Xen\0", &[0; 4]))));
    let plain = elf(0x20_0000, &[0x5a; 300], &note(18, b"Xen\0", &[0, 0, 0x20, 0]));
    let memory = memory();
    for file in [&whole, &plain] {
        for cut in 0..file.len() {
            let _ = load(&memory, &boot(&file[..cut], None), &mut CpuState::reset());
        }
        for at in 0..file.len() {
            for byte in [0, 0x7f, 0xff] {
                let mut changed = file.clone();
                changed[at] = byte;
                let _ = load(&memory, &boot(&changed, None), &mut CpuState::reset());
            }
        }
    }
}

#[test]
fn acpi_tables_point_to_each_other_and_sum_to_zero() {
    let memory = memory();
    load(&memory, &boot(&elf(0x100_0000, b"x", &[]), None), &mut CpuState::reset()).unwrap();
    let zero = |gpa, bytes| read(&memory, gpa, bytes).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0;
    assert_eq!(read(&memory, RSDP, 8), b"RSD PTR ");
    assert_eq!(read(&memory, 0xf_fff0, 4), [0xb0, 0xfe, 0xe6, 0x64], "who jumps to the PC's reset vector resets");
    assert!(zero(RSDP, 20) && zero(RSDP, 36));
    let table = |gpa: u64| {
        let bytes = number(&memory, gpa + 4, 4) as usize;
        assert!(zero(gpa, bytes), "{gpa:#x}");
        (read(&memory, gpa, 4), bytes)
    };
    let xsdt = number(&memory, RSDP + 24, 8);
    assert_eq!(table(xsdt), (b"XSDT".to_vec(), 36 + 16));
    let (fadt, madt) = (number(&memory, xsdt + 36, 8), number(&memory, xsdt + 44, 8));
    assert_eq!(table(fadt), (b"FACP".to_vec(), 276));
    assert_eq!(table(madt), (b"APIC".to_vec(), 44 + 2 * 8 + 12 + 6));
    assert_eq!(number(&memory, fadt + 112, 4) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    let dsdt = number(&memory, fadt + 140, 8);
    let (name, bytes) = table(dsdt);
    assert_eq!(name, b"DSDT");
    let aml = read(&memory, dsdt, bytes);
    let count = |needle: &[u8]| aml.windows(needle.len()).filter(|window| *window == needle).count();
    assert_eq!((count(b"VM_Gen_Counter"), count(b"ACPI0013"), count(b"_EVT")), (2, 1, 1));
    assert_eq!((count(b"LNRO0005"), count(b"COM1"), count(b"_S5_")), (2, 1, 1));
}

#[test]
fn a_real_kernel_is_placed() {
    let Some(path) = std::env::var_os("GODWIT_TEST_KERNEL") else {
        eprintln!("SKIPPED: GODWIT_TEST_KERNEL names no kernel");
        return;
    };
    let file = std::fs::read(&path).unwrap();
    let memory = GuestMemory::create(512 << 20).unwrap();
    let mut first = CpuState::reset();
    load(&memory, &boot(&file, None), &mut first).unwrap();
    let code = read(&memory, first.rip, 64);
    assert!(code.iter().any(|byte| *byte != 0), "{path:?}");
    if let Some(directory) = std::env::var_os("GODWIT_TEST_ACPI_DIR") {
        for (gpa, table) in acpi::tables(2, &WINDOWS, true) {
            let name = String::from_utf8_lossy(&table[..4]).into_owned();
            std::fs::write(std::path::Path::new(&directory).join(format!("{gpa:x}-{name}.aml")), &table).unwrap();
        }
    }
}
