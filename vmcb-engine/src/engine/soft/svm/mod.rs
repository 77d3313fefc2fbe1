//! SVM (APM2 chapter 15): entering and leaving a guest by its VMCB, intercepts, nested paging.
//!
//! | file | what |
//! |---|---|
//! | `exit` | a #VMEXIT on its way, and how instructions ask whether they are intercepted |
//! | `control` | the control area of the loaded VMCB in usable form, permission maps |
//! | `physical`, `nested` | system-physical memory; guest-physical to system-physical through the nested tables |
//! | `msr` | MSRs that the processor itself keeps |
//! | `mmio` | one instruction emulated for the host, with devices answering |
//! | `enter`, `leave` | VMRUN and #VMEXIT |
//! | `bare` | a processor for tests: flat long mode without a VMCB |
//!
//! This room refuses to know which intercepts a host chooses and what it does with exits.

pub mod bare;
pub mod control;
pub mod enter;
pub mod exit;
pub mod leave;
pub mod mmio;
pub mod msr;
pub mod nested;
pub mod physical;
