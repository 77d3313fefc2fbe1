//! The instructions of SVM (APM2 15.5, 15.17; APM3). Inside a guest the host sees them first; a host that runs on this
//! processor itself (EFER.SVME set, no guest loaded) gets VMRUN of a VMCB in its own RAM.

use crate::engine::soft::core::{Core, RAX, Step};
use crate::engine::soft::op::Op;
use crate::vmcb::registers::{cr0, efer};
use crate::vmcb::{Intercept, Vmcb};

/// #UD without SVM or protected mode, #GP(0) above CPL 0, then the intercept (APM2 15.4).
fn check(core: &mut Core, which: Intercept) -> Step {
    if core.efer & efer::SVME == 0 || core.cr0 & cr0::PE == 0 {
        return core.undefined();
    }
    if core.cpl != 0 {
        return core.general_protection();
    }
    core.intercept(which)
}

/// The VMCB at RAX: #GP(0) if it is not aligned or not RAM.
fn vmcb_address(core: &mut Core) -> Step<u64> {
    let address = core.gprs[RAX];
    if address & 0xfff != 0 || core.memory.page_of(address).is_none() {
        return core.general_protection();
    }
    Ok(address)
}

fn read_vmcb(core: &mut Core, address: u64) -> Step<Vmcb> {
    let mut page = [0; 4096];
    if core.memory.read(address, &mut page).is_err() {
        return core.general_protection();
    }
    Ok(Vmcb::from_bytes(&page))
}

/// VMRUN.
pub fn vmrun(core: &mut Core, op: &Op) -> Step {
    check(core, Intercept::VMRUN)?;
    // One level only: a host that lets its guest's VMRUN through has made an illegal VMCB, which VMRUN refuses.
    if core.control.guest {
        return core.undefined();
    }
    let address = vmcb_address(core)?;
    core.run_hosted(address, op)
}

/// VMLOAD.
pub fn vmload(core: &mut Core, _: &Op) -> Step {
    check(core, Intercept::VMLOAD)?;
    let address = vmcb_address(core)?;
    let vmcb = read_vmcb(core, address)?;
    core.vmload(&vmcb.save);
    Ok(())
}

/// VMSAVE.
pub fn vmsave(core: &mut Core, _: &Op) -> Step {
    check(core, Intercept::VMSAVE)?;
    let address = vmcb_address(core)?;
    let mut vmcb = read_vmcb(core, address)?;
    core.vmsave(&mut vmcb.save);
    core.write_hosted(address, &vmcb);
    Ok(())
}

/// VMMCALL: #UD unless it is intercepted.
pub fn vmmcall(core: &mut Core, _: &Op) -> Step {
    core.intercept(Intercept::VMMCALL)?;
    core.undefined()
}

/// STGI.
pub fn stgi(core: &mut Core, _: &Op) -> Step {
    check(core, Intercept::STGI)?;
    core.control.gif = true;
    Ok(())
}

/// CLGI.
pub fn clgi(core: &mut Core, _: &Op) -> Step {
    check(core, Intercept::CLGI)?;
    core.control.gif = false;
    Ok(())
}

/// SKINIT: not on this processor; a host sees it first.
pub fn skinit(core: &mut Core, _: &Op) -> Step {
    check(core, Intercept::SKINIT)?;
    core.undefined()
}
