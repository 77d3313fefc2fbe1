//! Data keys under cluster keys: what an operator must keep besides the bucket.
//!
//! A VM's data key lies in the bucket, wrapped by the cluster key with AES-256-GCM; the VM's id is the associated data. A
//! cluster key has a name that betrays nothing of it, so that a wrapped key says which cluster key opens it:
//! `BLAKE3.derive_key("godwit 2026-11 key id", key)`, 8 bytes.
//!
//! This room refuses to know where keys are kept.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::ids::{KeyId, VmId};
use crate::seal::DataKey;
use crate::v1::WrappedKey;

/// A cluster key.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; 32]);

impl ClusterKey {
    /// From 32 random bytes.
    pub fn new(bytes: [u8; 32]) -> ClusterKey {
        ClusterKey(bytes)
    }

    /// The secret itself, for the file that keeps it.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// Its name.
    pub fn id(&self) -> KeyId {
        let mut hasher = blake3::Hasher::new_derive_key("godwit 2026-11 key id");
        hasher.update(&self.0);
        let mut id = KeyId::default();
        hasher.finalize_xof().fill(&mut id.0);
        id
    }

    fn cipher(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &self.0).expect("a cluster key has 32 bytes"))
    }

    /// Wraps a VM's data key. `nonce` is random.
    pub fn wrap(&self, key: &DataKey, vm: VmId, nonce: [u8; 12]) -> WrappedKey {
        let mut sealed = key.expose().to_vec();
        let under = Nonce::assume_unique_for_key(nonce);
        self.cipher()
            .seal_in_place_append_tag(under, Aad::from(vm.0), &mut sealed)
            .expect("32 bytes are within limits");
        WrappedKey { cluster_key: self.id().to_vec(), nonce: nonce.to_vec(), sealed }
    }

    /// The data key of a VM; `None` if this key did not wrap it, or its bytes were changed.
    pub fn unwrap(&self, wrapped: &WrappedKey, vm: VmId) -> Option<DataKey> {
        let nonce = Nonce::try_assume_unique_for_key(&wrapped.nonce).ok()?;
        let mut text = wrapped.sealed.clone();
        let plain = self.cipher().open_in_place(nonce, Aad::from(vm.0), &mut text).ok()?;
        DataKey::from_slice(plain)
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({}, secret)", self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([3; 16]);

    #[test]
    fn only_the_key_that_wrapped_it_unwraps_it_and_only_for_its_vm() {
        let (cluster, data) = (ClusterKey::new([1; 32]), DataKey::new([2; 32]));
        let wrapped = cluster.wrap(&data, VM, [5; 12]);
        assert_eq!(cluster.unwrap(&wrapped, VM), Some(data));
        assert_eq!(cluster.unwrap(&wrapped, VmId([4; 16])), None);
        assert_eq!(ClusterKey::new([9; 32]).unwrap(&wrapped, VM), None);
        assert_eq!(wrapped.cluster_key, cluster.id().to_vec());
        for at in 0..wrapped.sealed.len() {
            let mut changed = wrapped.clone();
            changed.sealed[at] ^= 1;
            assert_eq!(cluster.unwrap(&changed, VM), None);
        }
        assert_eq!(cluster.unwrap(&WrappedKey::default(), VM), None);
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let shown = format!("{:?} {:?}", ClusterKey::new([0xab; 32]), DataKey::new([0xcd; 32]));
        assert!(!shown.contains("abab") && !shown.contains("cdcd") && !shown.contains("171"), "{shown}");
    }
}
