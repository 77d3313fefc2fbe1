//! `ctl vm ...`: one call each. What a VM is made of is put together in [`super::config`].

use proto::status::Code;
use proto::v1;

use super::client::Client;
use super::console;
use super::failure::Failure;
use super::gdb;
use super::grammar::{Isolation, VmCommand, VmCreateArgs};
use super::operation::{self, Outcome};
use super::output::{self, Format};
use super::report::{Done, List, Restored, Vm};
use super::units::show_ms;
use super::{config, report};

/// Carries out a command.
///
/// # Errors
/// What the controller refused, or what was wrong with the flags.
pub async fn run(mut client: Client, command: VmCommand, format: Format) -> Result<(), Failure> {
    match command {
        VmCommand::Create(args) => create(client, args, format).await,
        VmCommand::Ls => {
            let reply = client.list_vms(v1::Empty {}).await.map_err(|e| Failure::from_status("list the VMs", &e))?;
            output::print(format, &List(reply.into_inner().vms.into_iter().map(Vm::from).collect()))
        }
        VmCommand::Show(arg) => {
            let doing = format!("show {}", arg.vm);
            let reply = client.get_vm_record(name(&arg.vm)).await.map_err(|e| Failure::from_status(&doing, &e))?;
            output::print(format, &Vm::from(reply.into_inner()))
        }
        VmCommand::Console(args) => console::run(client, &args.vm, args.log).await,
        VmCommand::Gdb(args) => gdb::run(client, &args.vm, args.listen).await,
        VmCommand::Pause(arg) => {
            let call = client.clone();
            let outcome = operation::follow(&call, &format!("pause {}", arg.vm), client.pause(name(&arg.vm))).await?;
            changed(outcome, "paused", &arg.vm, format)
        }
        VmCommand::Resume(arg) => {
            let call = client.clone();
            let outcome = operation::follow(&call, &format!("resume {}", arg.vm), client.resume(name(&arg.vm))).await?;
            changed(outcome, "resumed", &arg.vm, format)
        }
        VmCommand::Stop(arg) => {
            let call = client.clone();
            let outcome = operation::follow(&call, &format!("stop {}", arg.vm), client.stop(name(&arg.vm))).await?;
            changed(outcome, "stopped", &arg.vm, format)
        }
        VmCommand::Rm(arg) => {
            let call = client.clone();
            let outcome = operation::follow(&call, &format!("remove {}", arg.vm), client.remove(name(&arg.vm))).await?;
            // The record that comes back, if any, is of a VM that is no more.
            changed(Outcome { done: v1::OperationDone::default(), ..outcome }, "removed", &arg.vm, format)
        }
    }
}

async fn create(mut client: Client, args: VmCreateArgs, format: Format) -> Result<(), Failure> {
    let on_isolation = match args.on_isolation {
        Isolation::Pause => v1::IsolationPolicy::Pause,
        Isolation::KeepRunning => v1::IsolationPolicy::KeepRunning,
    };
    let request = v1::CreateVmRecordRequest {
        vm: args.name.clone(),
        host: args.host.clone(),
        config: Some(config::build(&args)?),
        on_isolation: on_isolation.into(),
    };
    let call = client.clone();
    let what = format!("create {} on {}", args.name, args.host);
    let outcome = operation::follow(&call, &what, client.create_vm_record(request)).await?;
    if outcome.done.vm.is_none() {
        return Err(Failure::new(Code::Protocol, format!("{what}: done, but the controller sent no record of it")));
    }
    changed(outcome, "created", &args.name, format)
}

/// Prints what became of a VM: for people a line, for programs its record.
pub fn changed(outcome: Outcome, how: &str, vm: &str, format: Format) -> Result<(), Failure> {
    let before_ms = outcome.before.as_secs_f64() * 1e3;
    let restored = outcome.done.restore.map(|report| Restored::new(report, before_ms));
    let soon = match &restored {
        Some(restored) if restored.first_instruction_ms > 0.0 => {
            format!(", first instruction after {}", show_ms(restored.first_instruction_ms))
        }
        _ => String::new(),
    };
    match (outcome.done.vm, format) {
        (Some(record), Format::Table) => {
            let message = format!(
                "{vm} is {how}: {} on {}, generation {}{soon}",
                report::dash(&record.observed),
                report::dash(&record.host),
                record.generation
            );
            output::print(format, &Done { message, operation: outcome.operation })
        }
        (Some(record), _) => {
            let mut vm = Vm::from(record);
            vm.restore = restored;
            output::print(format, &vm)
        }
        (None, _) => output::print(format, &Done { message: format!("{vm} is {how}"), operation: outcome.operation }),
    }
}

fn name(vm: &str) -> v1::VmName {
    v1::VmName { vm: vm.to_owned() }
}
