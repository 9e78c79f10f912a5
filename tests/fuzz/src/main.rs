//! One target under libFuzzer; run.sh says which.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| emberline_fuzz::chosen()(data));
