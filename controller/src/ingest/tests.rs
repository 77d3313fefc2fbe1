//! Promises of the lanes: what is changed, cut, reordered or missing on the way is found; what is durable comes back equal.
