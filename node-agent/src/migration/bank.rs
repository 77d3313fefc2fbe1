//! Pages with their stamps from the guest's side, for the tests of this room.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmcb_engine::memory::shared::{Run, SharedPages};
use vmcb_engine::memory::{Keeper, sized_memfd};

const PAGE: u64 = 4096;

/// Pages with their stamps, from the guest's side.
#[derive(Clone)]
pub struct Bank {
    pub data: Arc<File>,
    pub stamps: Arc<File>,
    pub keeper: Arc<Keeper>,
    pub pages: u64,
}

impl Bank {
    pub fn new(pages: u64) -> Self {
        let file = |name, bytes| Arc::new(File::from(sized_memfd(name, bytes).unwrap()));
        let data = file("data", pages * PAGE);
        let keeper = Arc::new(Keeper::new(OwnedFd::from(data.try_clone().unwrap()), pages).unwrap());
        Self { data, stamps: file("stamps", pages * 4), keeper, pages }
    }

    pub fn shared(&self) -> SharedPages {
        let fd = |file: &File| OwnedFd::from(file.try_clone().unwrap());
        let pages = SharedPages::new(fd(&self.data), fd(&self.stamps), self.pages * PAGE).unwrap();
        pages.with_kept(self.keeper.fd().try_clone_to_owned().unwrap()).unwrap()
    }

    pub fn write(&self, page: u64, bytes: &[u8], epoch: u32) {
        if self.keeper.is_frozen() {
            self.keeper.keep(page, self.shared().stamp(page).unwrap());
            self.stamps.write_all_at(&epoch.to_le_bytes(), page * 4).unwrap();
        }
        self.data.write_all_at(bytes, page * PAGE).unwrap();
        self.stamps.write_all_at(&epoch.to_le_bytes(), page * 4).unwrap();
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.shared().append_pages(Run { first: 0, pages: self.pages }, &mut bytes).unwrap();
        bytes
    }
}

/// A page that tells which it is.
pub fn noise(seed: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
