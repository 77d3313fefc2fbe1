//! Which pages of RAM are here, which are zero, and which to ask for next. Pure.
//!
//! ```text
//! missing --a frame brings it--> here          missing --answered without a frame--> zero (a hole until it is touched)
//! ```
//! What is asked for ahead are the pages that an earlier guest touched first, then it goes upwards from where the guest last waited,
//! and round: memory that is used is used
//! in neighbourhoods. Nothing here is kept on disk: what is here is seen in RAM itself, zero pages are asked for again.

use vmcb_engine::memory::shared::Run;

/// Most pages of one request ahead: those of one frame.
pub const AHEAD_PAGES: u64 = 256;

/// A bit for each page.
#[derive(Clone, Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(pages: u64) -> Bits {
        Bits(vec![0; pages.div_ceil(64) as usize])
    }

    fn get(&self, page: u64) -> bool {
        self.0[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    fn set(&mut self, page: u64, value: bool) {
        let (word, bit) = (&mut self.0[(page / 64) as usize], 1 << (page % 64));
        if value { *word |= bit } else { *word &= !bit }
    }
}

/// What is known of each page.
#[derive(Clone, Debug)]
pub struct Book {
    pages: u64,
    missing: u64,
    /// Here, or zero.
    known: Bits,
    /// Known to be zero and not touched yet.
    zero: Bits,
    /// Asked for ahead and not answered.
    asked: Bits,
    cursor: u64,
    /// Pages that a guest was seen to touch early, the next one last.
    advice: Vec<u64>,
}

impl Book {
    /// So many pages, of which these are here.
    pub fn new(pages: u64, here: &[Run]) -> Book {
        let bits = || Bits::new(pages);
        let mut book =
            Book { pages, missing: pages, known: bits(), zero: bits(), asked: bits(), cursor: 0, advice: Vec::new() };
        here.iter().for_each(|run| book.arrived(*run));
        book
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages of which nothing is known yet.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// Whether a page is here or zero.
    pub fn is_known(&self, page: u64) -> bool {
        page < self.pages && self.known.get(page)
    }

    /// Whether a page is zero and was not touched.
    pub fn is_zero(&self, page: u64) -> bool {
        page < self.pages && self.zero.get(page)
    }

    /// These pages are here.
    pub fn arrived(&mut self, run: Run) {
        for page in run.first..run.end().min(self.pages) {
            self.know(page);
            self.zero.set(page, false);
        }
    }

    /// Of these pages those that have not come are zero.
    pub fn answered(&mut self, run: Run) {
        for page in run.first..run.end().min(self.pages) {
            if !self.known.get(page) {
                self.know(page);
                self.zero.set(page, true);
            }
        }
    }

    fn know(&mut self, page: u64) {
        if !self.known.get(page) {
            self.known.set(page, true);
            self.missing -= 1;
        }
    }

    /// These pages are likely to be touched soon, in this order: they are asked for first.
    pub fn advise(&mut self, pages: &[u64]) {
        self.advice = pages.iter().rev().copied().filter(|page| *page < self.pages).collect();
    }

    /// The guest waits for this page: what lies behind it is likely to be next.
    pub fn touched(&mut self, page: u64) {
        self.cursor = page.min(self.pages.saturating_sub(1));
    }

    /// The next pages to ask for ahead; they are noted as asked for.
    pub fn ahead(&mut self) -> Option<Run> {
        let wanted = |book: &Book, page: u64| !book.known.get(page) && !book.asked.get(page);
        let from = |book: &Book, mut page: u64, end: u64| {
            while page < end {
                // Whole words that have nothing to ask for are most of them in the end.
                let word = (page / 64) as usize;
                if page.is_multiple_of(64) && book.known.0[word] | book.asked.0[word] == u64::MAX {
                    page += 64;
                } else if wanted(book, page) {
                    return Some(page);
                } else {
                    page += 1;
                }
            }
            None
        };
        while let Some(page) = self.advice.pop() {
            if wanted(self, page) {
                self.asked.set(page, true);
                return Some(Run { first: page, pages: 1 });
            }
        }
        let first = from(self, self.cursor, self.pages).or_else(|| from(self, 0, self.cursor))?;
        let end = (first / AHEAD_PAGES + 1).saturating_mul(AHEAD_PAGES).min(self.pages);
        let mut next = first;
        while next < end && wanted(self, next) {
            self.asked.set(next, true);
            next += 1;
        }
        self.cursor = if next == self.pages { 0 } else { next };
        Some(Run { first, pages: next - first })
    }

    /// What was asked for ahead and not answered will not be.
    pub fn forget_asked(&mut self) {
        self.asked = Bits::new(self.pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(first: u64, pages: u64) -> Run {
        Run { first, pages }
    }

    #[test]
    fn what_is_ahead_begins_where_the_guest_waited_and_goes_round() {
        let mut book = Book::new(1000, &[run(0, 10), run(300, 5)]);
        assert_eq!((book.missing(), book.ahead()), (985, Some(run(10, 246))));
        book.touched(700);
        assert_eq!(book.ahead(), Some(run(700, 68)), "up to the end of a frame");
        assert_eq!(book.ahead(), Some(run(768, 232)));
        assert_eq!(book.ahead(), Some(run(256, 44)), "from the start again, without what was asked for");
        assert_eq!(book.ahead(), Some(run(305, 207)));
        assert_eq!(book.ahead(), Some(run(512, 188)));
        assert_eq!(book.ahead(), None);
        book.forget_asked();
        assert!(book.ahead().is_some());
    }

    #[test]
    fn advice_comes_first_and_once() {
        let mut book = Book::new(1000, &[run(7, 1)]);
        book.advise(&[500, 7, 3, 5000, 500]);
        let asked: Vec<_> = (0..3).filter_map(|_| book.ahead()).collect();
        assert_eq!(asked, [run(500, 1), run(3, 1), run(0, 3)]);
    }

    #[test]
    fn what_did_not_come_by_the_answer_is_zero_until_it_is_touched() {
        let mut book = Book::new(100, &[]);
        book.arrived(run(3, 2));
        book.answered(run(0, 8));
        assert_eq!((book.missing(), book.is_zero(2), book.is_zero(3), book.is_known(3)), (92, true, false, true));
        book.arrived(run(2, 1));
        assert_eq!((book.missing(), book.is_zero(2), book.is_known(2)), (92, false, true));
        assert!(!book.is_known(8) && !book.is_known(100) && !book.is_zero(1 << 40));
    }

    proptest! {
        #[test]
        fn asking_ahead_comes_to_an_end_with_every_page_known(
            pages in 1..3000u64,
            here in proptest::collection::vec((0..3000u64, 1..300u64), 0..6),
            touches in proptest::collection::vec(0..4000u64, 0..20),
        ) {
            let mut book = Book::new(pages, &here.iter().map(|(f, n)| run(*f, *n)).collect::<Vec<_>>());
            let mut touches = touches.into_iter();
            let mut asked = 0;
            while let Some(next) = book.ahead() {
                prop_assert!(next.pages > 0 && next.pages <= AHEAD_PAGES && next.end() <= pages);
                prop_assert!((next.first..next.end()).all(|page| !book.is_known(page)));
                asked += next.pages;
                prop_assert!(asked <= pages, "a page is asked for once");
                if let Some(page) = touches.next() {
                    book.touched(page);
                }
                book.answered(next);
            }
            prop_assert_eq!(book.missing(), 0);
        }
    }
}
