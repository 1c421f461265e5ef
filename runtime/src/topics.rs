//! Which topics of a robot or a bag are the camera, its calibration, odometry and transforms.
//!
//! The configured names count where they exist and fit. Otherwise the topics' types, encodings and names decide: a colour
//! picture before a grey one, depth never; of several the one that names a colour camera; calibration, odometry and
//! transforms that belong to it. What cannot be decided is left to the caller, with the names to choose from.

use crate::config::Topics;
use crate::senses::{Sense, is_camera};
use mindseye_bridge::image::PixelKind;
use mindseye_bridge::ros::Graph;
use mindseye_bridge::time::TimeDelta;

/// A topic that a bag holds or a robot publishes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offered {
    /// Its name, with the leading slash.
    pub name: String,
    /// Its type, as `pkg/Name` or `pkg/msg/Name`.
    pub type_name: String,
    /// Messages in the bag; 0 where that is not known.
    pub messages: u64,
    /// What its pictures are, where one was looked at.
    pub pixels: Option<PixelKind>,
    /// The frame of its messages' headers, where one was looked at.
    pub frame_id: String,
}

/// The topics that are used, as places in the list offered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// What each place is for; a camera comes first.
    pub topics: Vec<(usize, Sense)>,
}

impl Chosen {
    /// The place of a topic.
    pub fn place(&self, sense: Sense) -> Option<usize> {
        self.topics.iter().find(|(_, s)| *s == sense).map(|(i, _)| *i)
    }
}

/// Why no camera was chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChooseError {
    /// None fits.
    #[error(
        "no camera topic {image} or {compressed}, and no other topic holds colour or grey pictures{among}"
    )]
    NoCamera {
        /// Raw topic looked for.
        image: String,
        /// Compressed topic looked for.
        compressed: String,
        /// What there is.
        among: String,
    },
    /// Several fit equally well.
    #[error("several cameras: {}; choose one with --image TOPIC, or by [topics] in a --config", .names.join(", "))]
    Several {
        /// Their topics.
        names: Vec<String>,
    },
    /// The topic asked for does not fit.
    #[error("{topic}: {reason}")]
    NotUsable {
        /// The topic.
        topic: String,
        /// Why not.
        reason: String,
    },
}

/// Topics that a caller insists on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The camera.
    pub image: Option<String>,
    /// Odometry.
    pub odom: Option<String>,
}

/// Words in topic names and what they say of a picture's use.
const IMAGE_WORDS: [(&str, i32); 21] = [
    ("color", 20),
    ("colour", 20),
    ("rgb", 20),
    ("front", 10),
    ("image_raw", 2),
    ("right", -2),
    ("side", -10),
    ("rear", -10),
    ("back", -10),
    ("thermal", -40),
    ("infra", -40),
    ("_ir", -40),
    ("/ir", -40),
    ("mask", -40),
    ("label", -40),
    ("semantic", -40),
    ("segment", -40),
    ("overlay", -40),
    ("annotat", -40),
    ("debug", -40),
    ("detection", -40),
];
/// Words in names of topics that hold no colours, where no message can be looked at.
const DEPTH_WORDS: [&str; 4] = ["depth", "disparity", "confidence", "range"];
const ODOM_WORDS: [(&str, i32); 6] = [
    ("/odom", 10),
    ("odom", 5),
    ("filtered", 2),
    ("ground_truth", -20),
    ("groundtruth", -20),
    ("truth", -20),
];

fn score(words: &[(&str, i32)], name: &str) -> i32 {
    let name = name.to_ascii_lowercase();
    words.iter().filter(|(word, _)| name.contains(word)).map(|(_, value)| value).sum()
}

/// `/camera/image_raw/compressed` is another form of `/camera/image_raw`.
fn base_name(name: &str) -> &str {
    name.strip_suffix("/compressed").unwrap_or(name)
}

/// The namespace of a topic: `/camera` of `/camera/image_raw`.
fn namespace(name: &str) -> &str {
    name.rfind('/').map_or("", |at| &name[..at])
}

/// Parts of the namespace that two topics share.
fn shared(a: &str, b: &str) -> usize {
    namespace(a).split('/').zip(namespace(b).split('/')).take_while(|(x, y)| x == y).count()
}

/// ROS 1 had a type of the same content before tf2.
const TF: &[&str] = &["tf2_msgs/TFMessage", "tf/tfMessage"];

fn is_type(offered: &Offered, names: &[&str]) -> bool {
    names.contains(&offered.type_name.replace("/msg/", "/").as_str())
}

/// What a topic of pictures is; by name where no message was looked at.
fn picture(offered: &Offered) -> Option<(Sense, PixelKind)> {
    let sense = match offered.type_name.replace("/msg/", "/").as_str() {
        "sensor_msgs/Image" => Sense::Image,
        "sensor_msgs/CompressedImage" => Sense::Compressed,
        _ => return None,
    };
    let name = offered.name.to_ascii_lowercase();
    let by_name = || {
        let depth = DEPTH_WORDS.iter().any(|word| name.contains(word));
        if depth { PixelKind::Depth } else { PixelKind::Colour }
    };
    Some((sense, offered.pixels.unwrap_or_else(by_name)))
}

/// Chooses from the topics offered.
///
/// # Errors
/// [`ChooseError`] when there is no camera, or not one.
pub fn choose(offered: &[Offered], topics: &Topics, wanted: &Wanted) -> Result<Chosen, ChooseError> {
    let (image, sense) = camera(offered, topics, wanted)?;
    let name = offered[image].name.as_str();
    let mut chosen = Chosen { topics: vec![(image, sense)] };
    let mut add = |place: Option<usize>, sense| chosen.topics.extend(place.map(|i| (i, sense)));
    add(calibration(offered, topics, image), Sense::CameraInfo);
    add(odometry(offered, topics, wanted, name)?, Sense::Odometry);
    add(transforms(offered, &topics.tf, "tf", name), Sense::Tf);
    add(transforms(offered, &topics.tf_static, "tf_static", name), Sense::TfStatic);
    // A bag may hold a topic in several forms: recorded twice, or under the old type and the new one.
    let forms: Vec<(usize, Sense)> = chosen
        .topics
        .iter()
        .flat_map(|(i, sense)| {
            let same = |j: &usize| {
                let (a, b) = (&offered[*i], &offered[*j]);
                i != j && a.name == b.name && (a.type_name == b.type_name || is_type(a, TF) && is_type(b, TF))
            };
            (0..offered.len()).filter(same).map(|j| (j, *sense)).collect::<Vec<_>>()
        })
        .collect();
    chosen.topics.extend(forms);
    Ok(chosen)
}

/// Sets the topics of a robot by what it publishes, where its configured ones are not among them, and to those that the
/// caller insists on; gives a line for each change.
pub fn adapt(topics: &mut Topics, offered: &[Offered], wanted: &Wanted) -> Vec<String> {
    let before = topics.clone();
    let undecided = adapt_silently(topics, offered, wanted);
    undecided.map(|e| e.to_string()).into_iter().chain(changes(&before, topics)).collect()
}

/// A line for every topic that is a new one.
fn changes<'a>(before: &'a Topics, after: &'a Topics) -> impl Iterator<Item = String> + 'a {
    let pairs = Sense::ALL.into_iter().map(|sense| (before.of(sense), after.of(sense)));
    pairs
        .filter(|(from, to)| from != to && !to.is_empty())
        .map(|(from, to)| if from.is_empty() { to.clone() } else { format!("{to} instead of {from}") })
}

/// What [`adapt`] does; the error says why no camera was chosen, where a person can choose one.
fn adapt_silently(topics: &mut Topics, offered: &[Offered], wanted: &Wanted) -> Option<ChooseError> {
    if let Some(topic) = &wanted.image {
        let (image, compressed) = (topics.image.clone(), topics.compressed.clone());
        let known = offered.iter().find(|o| o.name == *topic).and_then(picture).map(|(sense, _)| sense);
        let is_compressed = known.map_or(topic.ends_with("/compressed"), |sense| sense == Sense::Compressed);
        (topics.image, topics.compressed) =
            if is_compressed { (String::new(), topic.clone()) } else { (topic.clone(), String::new()) };
        if *topic != image && *topic != compressed {
            topics.camera_info = format!("{}/camera_info", namespace(base_name(topic)));
        }
    }
    if let Some(topic) = &wanted.odom {
        topics.odom.clone_from(topic);
    }
    let chosen = match choose(offered, topics, &Wanted::default()) {
        Ok(chosen) => chosen,
        Err(error @ ChooseError::Several { .. }) if wanted.image.is_none() => return Some(error),
        // The robot may start later: the configured names stay.
        Err(_) => return None,
    };
    let found = |sense| chosen.place(sense).map(|i| offered[i].name.clone());
    if wanted.image.is_none() {
        match (found(Sense::Image), found(Sense::Compressed)) {
            (Some(image), _) if image != topics.image => {
                (topics.image, topics.compressed) = (image, String::new());
            }
            (None, Some(compressed)) if compressed != topics.compressed => {
                (topics.image, topics.compressed) = (String::new(), compressed);
            }
            _ => {}
        }
    }
    for sense in [Sense::CameraInfo, Sense::Odometry, Sense::Tf, Sense::TfStatic] {
        let pinned = sense == Sense::Odometry && wanted.odom.is_some();
        if let Some(found) = found(sense).filter(|_| !pinned && !topics.of(sense).is_empty()) {
            *topics.of_mut(sense) = found;
        }
    }
    None
}

/// What robots publish now.
pub fn published(graph: &Graph) -> Vec<Offered> {
    let there = graph.topics().into_iter().filter(|t| t.publishers > 0);
    there.map(|t| Offered { name: t.name, type_name: t.type_name, ..Offered::default() }).collect()
}

/// Time for which a robot must have published the same topics before they are chosen from: drivers start one after the
/// other.
const SETTLED_AFTER: TimeDelta = TimeDelta::from_millis(1500);

/// Adapts the topics of a running robot to what it publishes, as [`adapt`] does, when it starts after the node did. A
/// topic that was once published stays, whatever comes or goes later: nothing changes to and fro.
#[derive(Debug)]
pub struct TopicWatch {
    topics: Topics,
    wanted: Wanted,
    /// Senses whose topics were once published.
    served: Vec<Sense>,
    offered: Vec<Offered>,
    since: TimeDelta,
    undecided: Option<ChooseError>,
}

/// What is to be changed.
#[derive(Debug, Default, PartialEq)]
pub struct Adapted {
    /// Senses with other topics than before; a topic may be empty now.
    pub senses: Vec<Sense>,
    /// For a person.
    pub lines: Vec<String>,
}

impl TopicWatch {
    /// A watch over a robot that was adapted to what it published at the start.
    pub fn new(topics: Topics, wanted: Wanted) -> Self {
        Self {
            topics,
            wanted,
            served: Vec::new(),
            offered: Vec::new(),
            since: TimeDelta::ZERO,
            undecided: None,
        }
    }

    /// The topics of now.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Looks at what is published at `now` (of any steady clock, which must not go backwards).
    pub fn look(&mut self, offered: Vec<Offered>, now: TimeDelta) -> Adapted {
        let published = |sense: Sense| offered.iter().any(|o| o.name == *self.topics.of(sense));
        let camera = published(Sense::Image) || published(Sense::Compressed);
        for sense in Sense::ALL {
            let is_served = if is_camera(sense) { camera } else { published(sense) };
            if is_served && !self.served.contains(&sense) {
                self.served.push(sense);
            }
        }
        if offered != self.offered {
            (self.offered, self.since) = (offered, now);
        }
        if now - self.since < SETTLED_AFTER || self.served.len() == Sense::ALL.len() {
            return Adapted::default();
        }
        let mut topics = self.topics.clone();
        let undecided = adapt_silently(&mut topics, &self.offered, &self.wanted);
        for sense in &self.served {
            topics.of_mut(*sense).clone_from(self.topics.of(*sense));
        }
        let senses = Sense::ALL.into_iter().filter(|s| topics.of(*s) != self.topics.of(*s)).collect();
        let mut lines: Vec<String> = changes(&self.topics, &topics).collect();
        if undecided != self.undecided && !self.served.contains(&Sense::Image) {
            lines.extend(undecided.as_ref().map(ChooseError::to_string));
            self.undecided = undecided;
        }
        self.topics = topics;
        Adapted { senses, lines }
    }
}

fn camera(offered: &[Offered], topics: &Topics, wanted: &Wanted) -> Result<(usize, Sense), ChooseError> {
    let pictures: Vec<(usize, Sense, PixelKind)> = offered
        .iter()
        .enumerate()
        .filter(|(_, o)| o.name != topics.imagination)
        .filter_map(|(i, o)| picture(o).map(|(sense, kind)| (i, sense, kind)))
        .collect();
    if let Some(topic) = &wanted.image {
        let found = pictures.iter().find(|(i, ..)| offered[*i].name == *topic);
        let not_usable = |reason: String| ChooseError::NotUsable { topic: topic.clone(), reason };
        return match found {
            Some((_, _, PixelKind::Depth)) => {
                Err(not_usable("it holds depth; choose a topic of colour or grey pictures".into()))
            }
            Some((_, _, PixelKind::Other)) => Err(not_usable("its pictures cannot be decoded".into())),
            Some((i, sense, _)) => Ok((*i, *sense)),
            None => {
                Err(not_usable(format!("no topic of pictures has this name{}", among(offered, &pictures))))
            }
        };
    }
    let usable = |kind: PixelKind| kind >= PixelKind::Grey;
    // The configured topics first; of the two the one with more messages.
    let configured = |(i, sense, kind): &&(usize, Sense, PixelKind)| {
        let name = if *sense == Sense::Image { &topics.image } else { &topics.compressed };
        offered[*i].name == *name && usable(*kind)
    };
    let more = |(i, sense, _): &&(usize, Sense, PixelKind)| (offered[*i].messages, *sense == Sense::Image);
    if let Some((i, sense, _)) = pictures.iter().filter(configured).max_by_key(more) {
        return Ok((*i, *sense));
    }
    let rank = |(i, _, kind): &(usize, Sense, PixelKind)| {
        let colour = if *kind == PixelKind::Colour { 30 } else { 0 };
        colour + score(&IMAGE_WORDS, &offered[*i].name)
    };
    let Some(best) = pictures.iter().filter(|p| usable(p.2)).map(rank).max() else {
        return Err(ChooseError::NoCamera {
            image: topics.image.clone(),
            compressed: topics.compressed.clone(),
            among: among(offered, &pictures),
        });
    };
    let best: Vec<_> = pictures.iter().filter(|p| rank(p) == best).collect();
    let cameras = |p: &&(usize, Sense, PixelKind)| namespace(base_name(&offered[p.0].name)).to_owned();
    let mut names: Vec<String> = best.iter().map(cameras).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() > 1 {
        return Err(ChooseError::Several { names: best.iter().map(|p| offered[p.0].name.clone()).collect() });
    }
    // Forms of one camera's picture: the one with more messages, a raw one of two equals, else the first by name.
    let place = |p: &&&(usize, Sense, PixelKind)| {
        let o = &offered[p.0];
        (o.messages, p.1 == Sense::Image, std::cmp::Reverse(o.name.clone()))
    };
    let (i, sense, _) = best.iter().max_by_key(place).copied().copied().unwrap_or(*best[0]);
    Ok((i, sense))
}

/// The topics of pictures and why each is none, for messages.
fn among(offered: &[Offered], pictures: &[(usize, Sense, PixelKind)]) -> String {
    let words: Vec<String> = pictures
        .iter()
        .map(|(i, _, kind)| match kind {
            PixelKind::Depth => format!("{} holds depth", offered[*i].name),
            PixelKind::Other => format!("{} cannot be decoded", offered[*i].name),
            PixelKind::Grey | PixelKind::Colour => offered[*i].name.clone(),
        })
        .collect();
    if words.is_empty() { String::new() } else { format!(" (there are: {})", words.join(", ")) }
}

/// The calibration of a camera: beside it, or of the same frame; the configured one for the configured camera.
fn calibration(offered: &[Offered], topics: &Topics, image: usize) -> Option<usize> {
    let name = &offered[image].name;
    let all: Vec<usize> =
        (0..offered.len()).filter(|i| is_type(&offered[*i], &["sensor_msgs/CameraInfo"])).collect();
    let named = |name: &str| all.iter().copied().find(|i| offered[*i].name == name);
    let beside = format!("{}/camera_info", namespace(base_name(name)));
    let is_configured = *name == topics.image || *name == topics.compressed;
    let frame = &offered[image].frame_id;
    let mut same_frame = all.iter().copied().filter(|i| !frame.is_empty() && offered[*i].frame_id == *frame);
    let only = || if all.len() == 1 { Some(all[0]) } else { None };
    named(&topics.camera_info)
        .filter(|_| is_configured)
        .or_else(|| named(&beside))
        .or_else(|| same_frame.next())
        .or_else(|| named(&topics.camera_info))
        .or_else(only)
}

fn odometry(
    offered: &[Offered],
    topics: &Topics,
    wanted: &Wanted,
    image: &str,
) -> Result<Option<usize>, ChooseError> {
    let all = || (0..offered.len()).filter(|i| is_type(&offered[*i], &["nav_msgs/Odometry"]));
    let named = |name: &str| all().find(|i| offered[*i].name == name);
    if let Some(topic) = &wanted.odom {
        let names: Vec<&str> = all().map(|i| offered[i].name.as_str()).collect();
        let there = if names.is_empty() { "there is none".into() } else { names.join(", ") };
        return named(topic).map(Some).ok_or_else(|| ChooseError::NotUsable {
            topic: topic.clone(),
            reason: format!("no topic of nav_msgs/Odometry has this name ({there})"),
        });
    }
    if topics.odom.is_empty() {
        return Ok(None);
    }
    let rank = |i: &usize| {
        let o = &offered[*i];
        (score(&ODOM_WORDS, &o.name), shared(&o.name, image), o.messages, std::cmp::Reverse(o.name.clone()))
    };
    Ok(named(&topics.odom).or_else(|| all().max_by_key(rank)))
}

/// The transforms under the configured name, else those nearest to the camera whose topic has the usual last part.
fn transforms(offered: &[Offered], configured: &str, last: &str, image: &str) -> Option<usize> {
    if configured.is_empty() {
        return None;
    }
    let all = || (0..offered.len()).filter(|i| is_type(&offered[*i], TF));
    let rank = |i: &usize| {
        let o = &offered[*i];
        (shared(&o.name, image), o.messages, std::cmp::Reverse(o.name.clone()))
    };
    let named = all().find(|i| offered[*i].name == configured);
    named.or_else(|| all().filter(|i| offered[*i].name.rsplit('/').next() == Some(last)).max_by_key(rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: &str = "sensor_msgs/msg/Image";
    const COMPRESSED: &str = "sensor_msgs/msg/CompressedImage";

    fn topic(name: &str, type_name: &str, messages: u64, pixels: Option<PixelKind>, frame: &str) -> Offered {
        Offered { name: name.into(), type_name: type_name.into(), messages, pixels, frame_id: frame.into() }
    }

    fn names(offered: &[Offered], wanted: &Wanted) -> Result<Vec<String>, String> {
        choose(offered, &Topics::default(), wanted)
            .map(|c| c.topics.iter().map(|(i, s)| format!("{s:?} {}", offered[*i].name)).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_depth_camera_gives_its_colours() {
        let (colour, depth, grey) = (Some(PixelKind::Colour), Some(PixelKind::Depth), Some(PixelKind::Grey));
        let offered = [
            topic("/cam/depth/image_rect_raw", IMAGE, 300, depth, "d"),
            topic("/cam/depth/camera_info", "sensor_msgs/CameraInfo", 300, None, "d"),
            topic("/cam/infra1/image_rect_raw", IMAGE, 300, grey, "i"),
            topic("/cam/color/image_raw/compressed", COMPRESSED, 98, colour, "c"),
            topic("/cam/color/camera_info", "sensor_msgs/CameraInfo", 98, None, "c"),
            topic("/mindseye/imagination/compressed", COMPRESSED, 900, colour, "x"),
        ];
        let want = ["Compressed /cam/color/image_raw/compressed", "CameraInfo /cam/color/camera_info"];
        assert_eq!(names(&offered, &Wanted::default()).unwrap(), want);
        // Under the configured name, too.
        let named = [
            topic("/camera/image_raw", IMAGE, 300, depth, "d"),
            topic("/other/image", COMPRESSED, 98, colour, "c"),
        ];
        assert_eq!(names(&named, &Wanted::default()).unwrap(), ["Compressed /other/image"]);
        // By name where no message was looked at.
        let live = [
            topic("/cam/aligned_depth/image_raw", IMAGE, 0, None, ""),
            topic("/cam/rgb/image_raw", IMAGE, 0, None, ""),
        ];
        assert_eq!(names(&live, &Wanted::default()).unwrap(), ["Image /cam/rgb/image_raw"]);
        let only = names(&offered[..2], &Wanted::default()).unwrap_err();
        assert!(only.contains("/cam/depth/image_rect_raw holds depth"), "{only}");
    }

    #[test]
    fn a_camera_is_named_by_the_caller() {
        let colour = Some(PixelKind::Colour);
        let offered = [
            topic("/a/image_raw", IMAGE, 10, colour, ""),
            topic("/b/image_raw", IMAGE, 10, colour, ""),
            topic("/b/depth", IMAGE, 10, Some(PixelKind::Depth), ""),
            topic("/wheel/odom", "nav_msgs/msg/Odometry", 10, None, ""),
            topic("/ground_truth/odom", "nav_msgs/msg/Odometry", 99, None, ""),
        ];
        let several = names(&offered, &Wanted::default()).unwrap_err();
        assert_eq!(
            several,
            "several cameras: /a/image_raw, /b/image_raw; choose one with --image TOPIC, or by [topics] in a --config"
        );
        let wanted = |image: &str, odom: Option<&str>| Wanted {
            image: Some(image.into()),
            odom: odom.map(str::to_owned),
        };
        assert_eq!(
            names(&offered, &wanted("/b/image_raw", None)).unwrap(),
            ["Image /b/image_raw", "Odometry /wheel/odom"]
        );
        assert_eq!(
            names(&offered, &wanted("/b/image_raw", Some("/ground_truth/odom"))).unwrap()[1],
            "Odometry /ground_truth/odom"
        );
        for (wanted, want) in [
            (wanted("/b/depth", None), "/b/depth: it holds depth"),
            (wanted("/c", None), "/c: no topic of pictures has this name (there are: /a/image_raw,"),
            (
                wanted("/a/image_raw", Some("/x")),
                "/x: no topic of nav_msgs/Odometry has this name (/wheel/odom,",
            ),
        ] {
            let got = names(&offered, &wanted).unwrap_err();
            assert!(got.starts_with(want), "{got}");
        }
    }

    #[test]
    fn transforms_of_the_same_robot() {
        let colour = Some(PixelKind::Colour);
        let offered = [
            topic("/robot2/tf", "tf2_msgs/msg/TFMessage", 99, None, ""),
            topic("/robot1/tf", "tf2_msgs/msg/TFMessage", 10, None, ""),
            topic("/robot1/tf_static", "tf2_msgs/msg/TFMessage", 1, None, ""),
            topic("/robot1/camera/image_raw", IMAGE, 10, colour, ""),
            topic("/robot1/camera/image_raw/compressed", COMPRESSED, 9, colour, ""),
        ];
        let want = ["Image /robot1/camera/image_raw", "Tf /robot1/tf", "TfStatic /robot1/tf_static"];
        assert_eq!(names(&offered, &Wanted::default()).unwrap(), want);
        let ros1 = [
            topic("/tf", "tf/msg/tfMessage", 10, None, ""),
            topic("/camera/image_raw", "sensor_msgs/Image", 10, colour, ""),
        ];
        assert_eq!(names(&ros1, &Wanted::default()).unwrap(), ["Image /camera/image_raw", "Tf /tf"]);
    }

    #[test]
    fn a_topic_in_several_forms_is_read_whole() {
        let offered = [
            topic("/camera/image_raw", IMAGE, 10, Some(PixelKind::Colour), ""),
            topic("/tf", "tf/msg/tfMessage", 10, None, ""),
            topic("/tf", "tf2_msgs/msg/TFMessage", 5, None, ""),
        ];
        let want = ["Image /camera/image_raw", "Tf /tf", "Tf /tf"];
        assert_eq!(names(&offered, &Wanted::default()).unwrap(), want);
    }

    #[test]
    fn a_robot_with_other_names_is_adapted_to() {
        let offered = [
            topic("/robot1/cam/image_raw/compressed", COMPRESSED, 0, None, ""),
            topic("/robot1/cam/depth/image_raw", IMAGE, 0, None, ""),
            topic("/robot1/tf", "tf2_msgs/msg/TFMessage", 0, None, ""),
            topic("/mindseye/imagination/compressed", COMPRESSED, 0, None, ""),
        ];
        let mut topics = Topics::default();
        let lines = adapt(&mut topics, &offered, &Wanted::default());
        assert_eq!((topics.image.as_str(), topics.tf.as_str()), ("", "/robot1/tf"));
        assert_eq!(topics.compressed, "/robot1/cam/image_raw/compressed");
        assert_eq!(topics.odom, "/odom", "nothing better was seen");
        assert!(lines.contains(&"/robot1/tf instead of /tf".to_owned()), "{lines:?}");
        // The robot is not there yet.
        let mut topics = Topics::default();
        assert!(adapt(&mut topics, &[], &Wanted::default()).is_empty());
        assert!(adapt(&mut topics, &offered[3..], &Wanted::default()).is_empty());
        assert_eq!(topics, Topics::default());
        // What the caller says counts, seen or not.
        let wanted = Wanted { image: Some("/x/image_raw".into()), odom: Some("/y".into()) };
        adapt(&mut topics, &offered, &wanted);
        assert_eq!((topics.image.as_str(), topics.compressed.as_str()), ("/x/image_raw", ""));
        assert_eq!((topics.camera_info.as_str(), topics.odom.as_str()), ("/x/camera_info", "/y"));
    }

    #[test]
    fn a_robot_that_starts_later_is_adapted_to_once() {
        let image = |name: &str| topic(name, IMAGE, 0, None, "");
        let [grey, colour, odom] = [
            image("/r/infra1/image_raw"),
            image("/r/color/image_raw"),
            topic("/r/odom", "nav_msgs/msg/Odometry", 0, None, ""),
        ];
        let (info, second) =
            (topic("/r/color/camera_info", "sensor_msgs/msg/CameraInfo", 0, None, ""), image("/s/image_raw"));
        let at = TimeDelta::from_millis;
        let mut watch = TopicWatch::new(Topics::default(), Wanted::default());
        let mut look = |offered: &[&Offered], millis: i64| {
            let adapted = watch.look(offered.iter().map(|o| (*o).clone()).collect(), at(millis));
            (adapted, watch.topics().clone())
        };
        assert_eq!(look(&[], 0).0, Adapted::default());
        assert_eq!(look(&[], 10_000).0, Adapted::default(), "the robot is not there yet");
        // Its drivers start one after the other: the grey camera comes first and is not taken.
        assert_eq!(look(&[&grey], 11_000).0, Adapted::default());
        assert_eq!(look(&[&grey, &colour, &info], 12_000).0, Adapted::default());
        assert_eq!(look(&[&grey, &colour, &info], 13_000).0, Adapted::default());
        let (adapted, topics) = look(&[&grey, &colour, &info], 13_600);
        assert_eq!(adapted.senses, [Sense::CameraInfo, Sense::Image, Sense::Compressed]);
        assert_eq!((topics.image.as_str(), topics.compressed.as_str()), ("/r/color/image_raw", ""));
        assert_eq!((topics.camera_info.as_str(), topics.odom.as_str()), ("/r/color/camera_info", "/odom"));
        assert!(
            adapted.lines.contains(&"/r/color/image_raw instead of /camera/image_raw".to_owned()),
            "{adapted:?}"
        );
        assert_eq!(look(&[&grey, &colour, &info], 13_700).0, Adapted::default(), "said once");
        // Odometry comes last. The camera goes, another one comes, the configured one comes: nothing changes to and fro.
        look(&[&grey, &colour, &info, &odom], 20_000);
        let (adapted, topics) = look(&[&grey, &colour, &info, &odom], 22_000);
        assert_eq!((adapted.senses.as_slice(), topics.odom.as_str()), (&[Sense::Odometry][..], "/r/odom"));
        let configured = image("/camera/image_raw");
        for (millis, offered) in
            [(30_000, [&second, &odom]), (40_000, [&second, &odom]), (50_000, [&configured, &second])]
        {
            look(&offered, millis);
            assert_eq!(look(&offered, millis + 5_000), (Adapted::default(), topics.clone()));
        }
    }

    #[test]
    fn a_choice_that_a_person_must_make_is_told_once() {
        let offered = [topic("/a/image_raw", IMAGE, 0, None, ""), topic("/b/image_raw", IMAGE, 0, None, "")];
        let mut watch = TopicWatch::new(Topics::default(), Wanted::default());
        watch.look(offered.to_vec(), TimeDelta::ZERO);
        let told = watch.look(offered.to_vec(), TimeDelta::from_millis(2000));
        assert!(
            told.senses.is_empty() && told.lines[0].starts_with("several cameras: /a/image_raw, /b"),
            "{told:?}"
        );
        assert_eq!(watch.look(offered.to_vec(), TimeDelta::from_millis(2100)), Adapted::default());
    }
}
