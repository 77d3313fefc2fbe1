//! A set of 256 interrupt vectors: IRR, ISR and TMR of a local APIC (APM2 16.6.3).

/// One bit a vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Vectors(pub [u64; 4]);

impl Vectors {
    /// Adds a vector.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    /// Removes a vector; false if it was not there.
    pub fn remove(&mut self, vector: u8) -> bool {
        let was = self.contains(vector);
        self.0[usize::from(vector / 64)] &= !(1 << (vector % 64));
        was
    }

    /// True if the vector is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 64)] >> (vector % 64) & 1 == 1
    }

    /// The vector of highest priority.
    #[inline]
    pub fn highest(&self) -> Option<u8> {
        let word = (0..4).rev().find(|word| self.0[*word] != 0)?;
        Some((word * 64 + 63 - self.0[word].leading_zeros() as usize) as u8)
    }

    /// The n-th of the eight 32-bit registers that show the set.
    pub fn register(&self, n: usize) -> u32 {
        (self.0[n / 2] >> (n % 2 * 32)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_is_a_bit_of_its_own() {
        let mut set = Vectors::default();
        for vector in 0..=255u8 {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
            assert_eq!(set.register(usize::from(vector) / 32) >> (vector % 32) & 1, 1);
        }
        for vector in (0..=255u8).rev() {
            assert!(set.remove(vector));
            assert!(!set.remove(vector));
        }
        assert_eq!(set.highest(), None);
    }
}
