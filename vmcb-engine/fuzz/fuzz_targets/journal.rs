//! libFuzzer around `bodies/journal.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| godwit_fuzz::journal::run(data));
