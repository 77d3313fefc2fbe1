//! libFuzzer around `bodies/x86.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| godwit_fuzz::x86::run(data));
