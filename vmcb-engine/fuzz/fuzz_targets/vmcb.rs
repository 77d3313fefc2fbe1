//! libFuzzer around `bodies/vmcb.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| godwit_fuzz::vmcb::run(data));
