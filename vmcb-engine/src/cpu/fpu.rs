//! x87 and SSE state as a 64-bit FXSAVE image (APM2 11.4.4), in one canonical form.
//!
//! Canonical: reserved bytes are zero and MXCSR_MASK is [`MXCSR_MASK`], so that equal states have equal bytes. In saved
//! form the image is cut into XSAVE components (APM2 11.5.2): 0 is bytes 0..160 without MXCSR and its mask, 1 is
//! the XMM registers; later components are opaque here. This file refuses to know floating point.

use std::collections::BTreeMap;

/// Bits of MXCSR that exist in the machine: no misaligned SSE.
pub const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after RESET (APM2 table 14-1).
pub const MXCSR_RESET: u32 = 0x1f80;
/// Largest later XSAVE component that is accepted from outside: AMX tile data.
pub const LATER_COMPONENT_MAX: usize = 8192;

const X87_BYTES: usize = 160;
const SSE_BYTES: usize = 256;
const SSE_START: usize = X87_BYTES;
const SSE_END: usize = SSE_START + SSE_BYTES;

/// The FXSAVE image and the XSAVE components after it.
#[derive(Clone, PartialEq, Eq)]
pub struct FxState {
    image: [u8; 512],
    /// XSAVE components 2 and up, each in its own bytes.
    pub later: BTreeMap<u32, Vec<u8>>,
}

impl FxState {
    /// After RESET (APM2 table 14-1): FCW 0040h, tag word 5555h (all registers hold +0.0, none is empty).
    pub fn reset() -> Self {
        Self::start(0x40, 0xff)
    }

    /// After INIT of the FPU by FNINIT and with MXCSR at its default: FCW 037Fh, all registers empty.
    pub fn fninit() -> Self {
        Self::start(0x37f, 0)
    }

    fn start(fcw: u16, ftw: u8) -> Self {
        let mut state = FxState { image: [0; 512], later: BTreeMap::new() };
        state.image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        state.set_fcw(fcw);
        state.set_ftw(ftw);
        state.set_mxcsr(MXCSR_RESET);
        state
    }

    /// From an FXSAVE64 image of any origin; reserved bytes and the mask are made canonical. MXCSR's reserved bits
    /// are dropped: who must raise #GP for them looks before.
    pub fn from_fxsave(image: &[u8; 512]) -> Self {
        let mut state = FxState { image: *image, later: BTreeMap::new() };
        state.image[5] = 0;
        state.image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        for register in 0..8 {
            state.image[32 + 16 * register + 10..32 + 16 * (register + 1)].fill(0);
        }
        state.image[SSE_END..].fill(0);
        state.set_mxcsr(state.mxcsr());
        state
    }

    /// The image, canonical.
    pub fn fxsave(&self) -> &[u8; 512] {
        &self.image
    }

    /// XSAVE component 0: bytes 0..160 with MXCSR and its mask zero.
    pub fn x87_component(&self) -> [u8; X87_BYTES] {
        let mut data = [0; X87_BYTES];
        data.copy_from_slice(&self.image[..X87_BYTES]);
        data[24..32].fill(0);
        data
    }

    /// XSAVE component 1: XMM0 to XMM15.
    pub fn sse_component(&self) -> [u8; SSE_BYTES] {
        let mut data = [0; SSE_BYTES];
        data.copy_from_slice(&self.image[SSE_START..SSE_END]);
        data
    }

    /// From components 0 and 1; `None` if a length is wrong or the bytes are not canonical.
    pub fn from_components(x87: &[u8], sse: &[u8], mxcsr: u32) -> Option<Self> {
        if x87.len() != X87_BYTES || sse.len() != SSE_BYTES {
            return None;
        }
        let mut image = [0; 512];
        image[..X87_BYTES].copy_from_slice(x87);
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        image[SSE_START..SSE_END].copy_from_slice(sse);
        let state = Self::from_fxsave(&image);
        (state.x87_component() == x87 && state.mxcsr() == mxcsr).then_some(state)
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.image[at], self.image[at + 1]])
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.image[at..at + 8].try_into().expect("eight bytes of the image"))
    }

    /// x87 control word.
    pub fn fcw(&self) -> u16 {
        self.u16_at(0)
    }

    /// x87 status word, TOP included.
    pub fn fsw(&self) -> u16 {
        self.u16_at(2)
    }

    /// Abridged tag word: bit set means that the physical register is not empty.
    pub fn ftw(&self) -> u8 {
        self.image[4]
    }

    /// Last x87 opcode, 11 bits.
    pub fn fop(&self) -> u16 {
        self.u16_at(6)
    }

    /// Last x87 instruction pointer.
    pub fn fip(&self) -> u64 {
        self.u64_at(8)
    }

    /// Last x87 data pointer.
    pub fn fdp(&self) -> u64 {
        self.u64_at(16)
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.image[24..28].try_into().expect("four bytes of the image"))
    }

    /// Register ST(`index`), relative to TOP as FXSAVE stores it: 80 bits, little-endian.
    pub fn st(&self, index: usize) -> [u8; 10] {
        let at = 32 + 16 * (index & 7);
        self.image[at..at + 10].try_into().expect("ten bytes of the image")
    }

    /// Register XMM`index`.
    pub fn xmm(&self, index: usize) -> u128 {
        let at = SSE_START + 16 * (index & 15);
        u128::from_le_bytes(self.image[at..at + 16].try_into().expect("sixteen bytes of the image"))
    }

    /// Sets the control word.
    pub fn set_fcw(&mut self, value: u16) {
        self.image[0..2].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets the status word.
    pub fn set_fsw(&mut self, value: u16) {
        self.image[2..4].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets the abridged tag word.
    pub fn set_ftw(&mut self, value: u8) {
        self.image[4] = value;
    }

    /// Sets the last opcode.
    pub fn set_fop(&mut self, value: u16) {
        self.image[6..8].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets the last instruction pointer.
    pub fn set_fip(&mut self, value: u64) {
        self.image[8..16].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets the last data pointer.
    pub fn set_fdp(&mut self, value: u64) {
        self.image[16..24].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets MXCSR; bits outside [`MXCSR_MASK`] are dropped.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.image[24..28].copy_from_slice(&(value & MXCSR_MASK).to_le_bytes());
    }

    /// Sets ST(`index`).
    pub fn set_st(&mut self, index: usize, value: [u8; 10]) {
        let at = 32 + 16 * (index & 7);
        self.image[at..at + 10].copy_from_slice(&value);
    }

    /// Sets XMM`index`.
    pub fn set_xmm(&mut self, index: usize, value: u128) {
        let at = SSE_START + 16 * (index & 15);
        self.image[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }
}

impl std::fmt::Debug for FxState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FxState {{ fcw {:#x}, fsw {:#x}, mxcsr {:#x}, .. }}", self.fcw(), self.fsw(), self.mxcsr())
    }
}
