//! Bookkeeping of sections: named, versioned, all of them consumed, none twice.
//!
//! The digests that two sides compare are `proto::digest`'s and passed on here.
//!
//! A machine is captured as a list of sections and applied from one. Whoever applies takes each section by name and says
//! which version it knows; what is missing, duplicate, unknown or too new fails before anything runs. What a section
//! holds is for its device to know.

use std::collections::BTreeMap;

pub use proto::digest::{machine_digest, state_digest};
use proto::v1::Section;

/// Why sections do not make a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SectionError {
    /// A name comes twice.
    #[error("section {0:?} comes twice")]
    Duplicate(String),
    /// The machine has something that the sections do not describe.
    #[error("section {0:?} is missing")]
    Missing(String),
    /// The sections describe something that the machine does not have.
    #[error("unknown sections: {}", .0.join(", "))]
    LeftOver(Vec<String>),
    /// Written by a later release, and not to be ignored.
    #[error("section {name:?} is of version {found_major}.{found_minor}; this release reads up to {major}.{minor}")]
    Version {
        /// The section.
        name: String,
        /// Its version.
        found_major: u32,
        /// Its version.
        found_minor: u32,
        /// Newest version that is known here.
        major: u32,
        /// Newest version that is known here.
        minor: u32,
    },
}

/// Sections that wait to be consumed.
#[derive(Debug)]
pub struct Sections(BTreeMap<String, Section>);

impl Sections {
    /// Takes them in.
    ///
    /// # Errors
    /// A name that comes twice.
    pub fn new(sections: impl IntoIterator<Item = Section>) -> Result<Self, SectionError> {
        let mut by_name = BTreeMap::new();
        for section in sections {
            if let Some(first) = by_name.insert(section.name.clone(), section) {
                return Err(SectionError::Duplicate(first.name));
            }
        }
        Ok(Self(by_name))
    }

    /// Consumes a section. The version is the newest that the caller knows; every older major must be known too, a newer
    /// minor is accepted if the section says that what is new in it may be ignored.
    ///
    /// # Errors
    /// It is missing or too new.
    pub fn take(&mut self, name: &str, (major, minor): (u32, u32)) -> Result<Section, SectionError> {
        let section = self.0.remove(name).ok_or_else(|| SectionError::Missing(name.to_owned()))?;
        let newer_minor = section.major == major && section.minor > minor && !section.ignorable;
        if section.major > major || newer_minor {
            let (found_major, found_minor) = (section.major, section.minor);
            return Err(SectionError::Version { name: section.name, found_major, found_minor, major, minor });
        }
        Ok(section)
    }

    /// Ends the consumption.
    ///
    /// # Errors
    /// Something is left over.
    pub fn finish(self) -> Result<(), SectionError> {
        if self.0.is_empty() { Ok(()) } else { Err(SectionError::LeftOver(self.0.into_keys().collect())) }
    }
}

/// The first section, by name, in which two lists differ: in body or version, or by being in one of them only.
pub fn first_difference(ours: &[Section], theirs: &[Section]) -> Option<String> {
    let by_name = |list: &[Section]| list.iter().map(|s| (s.name.clone(), s.clone())).collect::<BTreeMap<_, _>>();
    let (ours, theirs) = (by_name(ours), by_name(theirs));
    ours.keys().chain(theirs.keys()).filter(|name| ours.get(*name) != theirs.get(*name)).min().cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str, minor: u32, ignorable: bool) -> Section {
        Section { name: name.into(), major: 1, minor, ignorable, body: name.as_bytes().to_vec() }
    }

    #[test]
    fn every_section_is_consumed_exactly_once() {
        let all = || [section("clock", 0, false), section("cpu/0", 0, false)];
        let mut sections = Sections::new(all()).unwrap();
        assert_eq!(sections.take("clock", (1, 0)).unwrap().body, b"clock");
        assert_eq!(sections.take("clock", (1, 0)), Err(SectionError::Missing("clock".into())));
        assert_eq!(sections.finish(), Err(SectionError::LeftOver(vec!["cpu/0".into()])));
        let twice = all().into_iter().chain(all());
        assert_eq!(Sections::new(twice).unwrap_err(), SectionError::Duplicate("clock".into()));
    }

    #[test]
    fn a_newer_minor_is_accepted_only_if_it_says_so() {
        let take = |minor, ignorable, known| {
            Sections::new([section("a", minor, ignorable)]).unwrap().take("a", known).map(|section| section.minor)
        };
        assert_eq!(take(1, true, (1, 0)), Ok(1));
        assert_eq!(take(0, false, (1, 3)), Ok(0));
        assert_eq!(take(9, false, (2, 0)), Ok(9));
        assert!(matches!(take(1, false, (1, 0)), Err(SectionError::Version { found_minor: 1, .. })));
        assert!(matches!(take(0, true, (0, 9)), Err(SectionError::Version { .. })));
    }

    #[test]
    fn the_first_section_that_differs_is_named() {
        let (a, b) = (section("a", 0, false), section("b", 0, false));
        assert_eq!(first_difference(&[a.clone(), b.clone()], std::slice::from_ref(&a)), Some("b".into()));
        assert_eq!(first_difference(&[a.clone(), b.clone()], &[b, a]), None);
    }
}
