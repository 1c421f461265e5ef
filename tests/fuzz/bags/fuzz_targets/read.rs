/// Opens bytes that start with `magic`, reads them in every order, transcodes and decodes what there is.
fn read(magic: &[u8], bytes: &[u8]) {
    let mut whole = magic.to_vec();
    whole.extend_from_slice(bytes.strip_prefix(magic).unwrap_or(bytes));
    let mut options = bag::OpenOptions::default();
    options.chunk_bytes_max = 4 << 20;
    let Ok(bag) = bag::open_bytes("fuzzed", &whole, &options) else { return };
    let order = match bytes.len() % 3 {
        0 => bag::Order::LogTime,
        1 => bag::Order::PublishTime,
        _ => bag::Order::HeaderTime,
    };
    let options = bag::ReadOptions { threads: Some(0), order, ..bag::ReadOptions::default() };
    let mut last = i64::MIN;
    for message in bag.messages(&options) {
        assert!(message.order_time_ns >= last || order == bag::Order::LogTime);
        last = message.order_time_ns;
    }
    let mut on_image = |_| {};
    let report = bag::verify(&bag, &options, Some(&mut on_image), &mut |_| {});
    assert_eq!(report.topics.iter().map(|t| t.count).sum::<u64>(), report.messages);
}
