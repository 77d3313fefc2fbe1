//! A few at a time: the same work over many things, with a limit to how many are under way, results in order.

use tokio::task::JoinSet;

use crate::failure::Failure;
use proto::status::Code;

/// Does `work` for every item, at most `limit` at a time. All of it ends when the caller gives up.
///
/// # Errors
/// The first failure that is met; what is under way then is given up.
pub async fn abreast<T, R, F>(
    limit: usize,
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> F,
) -> Result<Vec<R>, Failure>
where
    R: Send + 'static,
    F: Future<Output = Result<R, Failure>> + Send + 'static,
{
    let mut under_way: JoinSet<(usize, Result<R, Failure>)> = JoinSet::new();
    let mut done: Vec<Option<R>> = Vec::new();
    let mut items = items.into_iter();
    loop {
        while under_way.len() < limit
            && let Some(item) = items.next()
        {
            let (number, ended) = (done.len(), work(item));
            done.push(None);
            under_way.spawn(async move { (number, ended.await) });
        }
        match under_way.join_next().await {
            Some(Ok((number, result))) => done[number] = Some(result?),
            Some(Err(_)) => return Err(Failure::new(Code::Internal, "work beside others ended early")),
            None => return Ok(done.into_iter().flatten().collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn results_are_in_order_and_never_more_than_the_limit_are_under_way() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let done = abreast(3, 0..50u64, |number| {
            let (now, most) = (now.clone(), most.clone());
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                for _ in 0..number % 7 {
                    tokio::task::yield_now().await;
                }
                now.fetch_sub(1, Ordering::SeqCst);
                Ok(number * 2)
            }
        });
        assert_eq!(done.await.unwrap(), (0..50).map(|number| number * 2).collect::<Vec<u64>>());
        assert_eq!(most.load(Ordering::SeqCst), 3);
        let failed = abreast(2, 0..9, |number| async move {
            if number == 4 { Err(Failure::new(Code::Corrupt, "the fifth")) } else { Ok(()) }
        });
        assert_eq!(failed.await.unwrap_err().message, "the fifth");
    }
}
