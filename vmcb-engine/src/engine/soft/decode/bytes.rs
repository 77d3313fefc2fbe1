//! The bytes of one instruction, fetched one by one, so that the second page is touched only if a byte of it is needed.
#![allow(unsafe_code, reason = "reads guest RAM through the host addresses that translation found")]

use super::Fetched;
use crate::engine::soft::block::lines_of;
use crate::engine::soft::core::{Core, Stop};

/// Why no further byte can be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// No such instruction: #UD.
    Undefined,
    /// The sixteenth byte: #GP.
    TooLong,
    /// The next byte is in another page and this is not the first instruction of the block.
    Crosses,
    /// The second page cannot be fetched from.
    Fetch(Stop),
}

/// Longest instruction (APM3 1.1).
const BYTES_MAX: usize = 15;

/// A cursor over the bytes of one instruction.
pub struct Cursor<'a> {
    core: &'a mut Core,
    host: *const u8,
    in_page: usize,
    first: bool,
    taken: usize,
    second: Option<Fetched>,
}

impl<'a> Cursor<'a> {
    /// At `at` bytes from the beginning of a block.
    pub fn new(core: &'a mut Core, fetched: Fetched, at: usize, first: bool) -> Self {
        let in_page = 0x1000 - (fetched.gpa & 0xfff) as usize - at;
        Self { core, host: fetched.host.wrapping_add(at), in_page, first, taken: 0, second: None }
    }

    /// Bytes taken so far.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// The second page and its lines, if a byte of it was taken.
    pub fn second_lines(&self) -> Option<(u64, u64)> {
        self.second.map(|second| (second.page, lines_of(0, self.taken - self.in_page)))
    }

    /// The next byte.
    pub fn byte(&mut self) -> Result<u8, Trouble> {
        if self.taken == BYTES_MAX {
            return Err(Trouble::TooLong);
        }
        if self.first && self.core.is_beyond_code(self.taken) {
            return self.core.general_protection().map_err(Trouble::Fetch);
        }
        let host = if self.taken < self.in_page {
            self.host.wrapping_add(self.taken)
        } else {
            self.second()?.host.wrapping_add(self.taken - self.in_page)
        };
        self.taken += 1;
        // SAFETY: `host` is inside the page of RAM that translation returned: the offset is below what is left of the
        // first page, or at most 14 bytes into the second. RAM stays mapped while a Core holds it.
        Ok(unsafe { host.read_volatile() })
    }

    fn second(&mut self) -> Result<Fetched, Trouble> {
        if let Some(second) = self.second {
            return Ok(second);
        }
        if !self.first {
            return Err(Trouble::Crosses);
        }
        // The first instruction of a block: it begins at RIP.
        let next = self.core.mask_rip(self.core.rip.wrapping_add(self.in_page as u64));
        let second = self.core.translate_code(next)?;
        self.second = Some(second);
        Ok(second)
    }

    /// A little-endian number of 1, 2, 4 or 8 bytes, zero-extended.
    pub fn number(&mut self, bytes: u8) -> Result<u64, Trouble> {
        let mut value = 0;
        for at in 0..bytes {
            value |= u64::from(self.byte()?) << (8 * at);
        }
        Ok(value)
    }

    /// The same, sign-extended.
    pub fn signed(&mut self, bytes: u8) -> Result<i64, Trouble> {
        let shift = 64 - 8 * u32::from(bytes);
        Ok((self.number(bytes)? << shift) as i64 >> shift)
    }
}
