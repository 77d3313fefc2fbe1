//! x87, MMX and SSE registers of one processor. Their arithmetic is in `sse/` and `x87/`; their saved form is the FXSAVE
//! image (APM2 11.4.4.2), which the CPU state carries per component.

/// x87, MMX and SSE state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fpu {
    /// x87 data registers by physical number: 64-bit significand and 16-bit sign and exponent.
    pub registers: [(u64, u16); 8],
    /// Control word.
    pub control: u16,
    /// Status word, TOP included.
    pub status: u16,
    /// One bit a physical register, 1 = valid: the abridged tag word of FXSAVE.
    pub tags: u8,
    /// Opcode of the last x87 instruction, 11 bits.
    pub opcode: u16,
    /// Address of the last x87 instruction.
    pub instruction_pointer: u64,
    /// Address of its operand.
    pub data_pointer: u64,
    /// XMM0-15.
    pub xmm: [u128; 16],
    /// SSE control and status.
    pub mxcsr: u32,
}

impl Default for Fpu {
    /// As after FNINIT and reset (APM2 14.1.3).
    fn default() -> Self {
        Self {
            registers: [(0, 0); 8],
            control: 0x037f,
            status: 0,
            tags: 0,
            opcode: 0,
            instruction_pointer: 0,
            data_pointer: 0,
            xmm: [0; 16],
            mxcsr: 0x1f80,
        }
    }
}
