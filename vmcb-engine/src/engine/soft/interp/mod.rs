//! Meanings of the general-purpose and system instructions, one file a family.
