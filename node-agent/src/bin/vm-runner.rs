//! `vm-runner --dir DIR`: the process of one guest, started by the agent. See `node_agent::runner`.

fn main() {}
