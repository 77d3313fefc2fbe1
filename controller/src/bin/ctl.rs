//! `ctl`, the operator's tool: see `controller::ctl`.

fn main() -> std::process::ExitCode {
    controller::ctl::main()
}
