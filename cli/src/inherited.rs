//! What whoever started this process left open in it: a lock, a pipe, a file with a secret. It is
//! this process's own, and not that of the commands that it starts.

use std::{fs, os::fd::BorrowedFd};

use rustix::io::{FdFlags, fcntl_setfd};

/// Keeps everything that is open, but for standard input, output and error, from the commands that
/// this process starts. To be called before anything else runs in it.
pub fn keep_from_commands() {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten();
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for number in numbers.filter(|number: &i32| *number > 2) {
        #[allow(
            unsafe_code,
            reason = "a number that was inherited has no owner to ask"
        )]
        // SAFETY: it has just been listed as open, and nobody else runs who could close it.
        let open = unsafe { BorrowedFd::borrow_raw(number) };
        // What is not open any more was the listing itself.
        let _ = fcntl_setfd(open, FdFlags::CLOEXEC);
    }
}
