/// Opens bytes that start with `magic`, reads them in every order, transcodes and decodes what there is, looks for the
/// type hash of every topic and for the publisher of every message, and reads the attachments.
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
    let mut converter = bag::CdrConverter::new(bag.info());
    let mut slots = bag::PublisherSlots::new(bag.info());
    let mut samples = vec![Vec::new(); bag.info().topics.len()];
    for message in bag.messages(&options) {
        assert!(message.order_time_ns >= last || order == bag::Order::LogTime);
        last = message.order_time_ns;
        let Ok(cdr) = converter.convert(&message) else { continue };
        assert!(slots.of(&message, cdr) < slots.count(message.topic));
        let of_topic = &mut samples[message.topic.0 as usize];
        if of_topic.len() < 8 {
            of_topic.push(cdr.to_vec());
        }
    }
    for (topic, samples) in bag.info().topics.iter().zip(&samples) {
        let _ = bag::type_key(topic, samples);
        let nameless = bag::TopicInfo { type_hash: None, schema: None, ..topic.clone() };
        let _ = bag::type_key(&nameless, samples);
    }
    for attachment in &bag.info().attachments {
        let mut bytes = 0;
        let mut each = |piece: &[u8]| -> std::io::Result<()> {
            bytes += piece.len() as u64;
            Ok(())
        };
        bag.read_attachment(attachment, &mut each).unwrap();
        assert_eq!(bytes, attachment.bytes);
    }
    let _ = bag.first_stamp_ns();
    let mut on_image = |_| {};
    let report = bag::verify(&bag, &options, Some(&mut on_image), &mut |_| {});
    assert_eq!(report.topics.iter().map(|t| t.count).sum::<u64>(), report.messages);
}
