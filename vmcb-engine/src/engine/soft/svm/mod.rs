//! SVM (APM2 chapter 15): entering and leaving a guest by its VMCB, intercepts, nested paging.
