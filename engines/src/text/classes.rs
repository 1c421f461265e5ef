//! Which of a detector's classes a goal names.

use super::{UnknownWord, spoken, unknown_words, word_ids};

/// Names of one thing. Spellings are those of COCO 2017, of the list `coco.names` that came with darknet and of Pascal
/// VOC; synonyms are members of one synset of WordNet 3.1 (`couch.n.01`, `television_receiver.n.01`,
/// `electric_refrigerator.n.01`, `bicycle.n.01`, `motorcycle.n.01`, `airplane.n.01`, `cellular_telephone.n.01`,
/// `hand_blower.n.01`, `backpack.n.01`, `microwave.n.02`, `laptop.n.01`, `teddy.n.01`, `bag.n.04`, `person.n.01`).
const SAME: &[&[&str]] = &[
    &["couch", "sofa", "lounge"],
    &["tv", "television", "telly", "tv set", "television set", "tvmonitor", "tv monitor"],
    &["refrigerator", "fridge", "icebox", "electric refrigerator"],
    &["bicycle", "bike", "cycle"],
    &["motorcycle", "motorbike"],
    &["airplane", "aeroplane", "plane"],
    &["cell phone", "cellphone", "mobile phone", "cellular phone", "cellular telephone", "mobile"],
    &["hair drier", "hair dryer", "blow dryer", "blow drier", "hand blower"],
    &["backpack", "back pack", "knapsack", "rucksack", "haversack"],
    &["microwave", "microwave oven"],
    &["laptop", "laptop computer"],
    &["teddy bear", "teddy"],
    &["handbag", "purse", "pocketbook"],
    &["person", "people", "individual", "somebody", "someone"],
    &["mouse", "mice"],
    &["knife", "knives"],
    &["dining table", "diningtable"],
    &["potted plant", "pottedplant", "pot plant", "houseplant"],
    &["donut", "doughnut"],
    &["wine glass", "wineglass"],
];

/// Why a goal names no class.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClassError {
    /// It holds words that no class has.
    #[error("the detector does not know {word:?} (the nearest word that it knows is {nearest:?})")]
    Unknown {
        /// The first such word.
        word: String,
        /// The nearest word of a class.
        nearest: String,
    },
    /// It names no class.
    #[error("the goal names nothing that the detector knows")]
    Nothing,
    /// It names several.
    #[error("one thing at a time: the goal names {}", names.join(" and "))]
    Several {
        /// Their names.
        names: Vec<String>,
    },
}

/// The class that a goal names, as a position in `classes`. Number, articles, case and the usual synonyms do not count; the
/// last word of a name stands for it where no other name ends so ("table" for "dining table").
///
/// # Errors
/// [`ClassError`]; a word that carries meaning and is no class's is refused, for the detector would go to another thing
/// than was asked for.
pub fn class_of(classes: &[String], goal: &str) -> Result<usize, ClassError> {
    let words = |text: &str| spoken(text).collect::<Vec<String>>();
    let said = words(goal);
    // All ways to say each class, the longest first, so that "hot dog" is not a dog.
    let mut ways: Vec<(Vec<String>, usize)> = Vec::new();
    for (class, name) in classes.iter().enumerate() {
        let name = words(name);
        let group = SAME.iter().find(|g| g.iter().any(|other| words(other) == name));
        ways.extend(group.into_iter().flat_map(|g| g.iter()).map(|other| (words(other), class)));
        ways.push((name, class));
    }
    let names: Vec<String> = classes.iter().map(|name| words(name).join(" ")).collect();
    for (class, name) in names.iter().enumerate() {
        let Some((_, last)) = name.rsplit_once(' ') else { continue };
        let ends_so = |n: &&String| n.rsplit(' ').next() == Some(last);
        if names.iter().filter(ends_so).count() == 1 {
            ways.push((vec![last.to_owned()], class));
        }
    }
    ways.retain(|(words, _)| !words.is_empty());
    ways.sort_by_key(|(words, _)| std::cmp::Reverse(words.len()));
    let mut left: Vec<Option<&String>> = said.iter().map(Some).collect();
    let mut named: Vec<usize> = Vec::new();
    for (way, class) in &ways {
        for at in 0..(left.len() + 1).saturating_sub(way.len()) {
            let here = &mut left[at..at + way.len()];
            let same = |(said, word): (&Option<&String>, &String)| {
                said.is_some_and(|said| !word_ids(std::slice::from_ref(word), said).is_empty())
            };
            if here.iter().zip(way).all(same) {
                here.fill(None);
                if !named.contains(class) {
                    named.push(*class);
                }
            }
        }
    }
    let rest: Vec<String> = left.into_iter().flatten().cloned().collect();
    let known: Vec<String> = ways.iter().flat_map(|(words, _)| words.clone()).collect();
    match (unknown_words(&known, &rest.join(" ")).into_iter().next(), &named[..]) {
        (Some(UnknownWord { word, nearest }), _) => Err(ClassError::Unknown { word, nearest }),
        (None, [class]) => Ok(*class),
        (None, []) => Err(ClassError::Nothing),
        (None, several) => {
            let mut several = several.to_vec();
            several.sort_unstable();
            Err(ClassError::Several { names: several.iter().map(|c| classes[*c].clone()).collect() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_name_classes() {
        let classes: Vec<String> = [
            "person",
            "chair",
            "sofa",
            "tvmonitor",
            "dining table",
            "hot dog",
            "dog",
            "cell_phone",
            "bus",
            "cup",
        ]
        .map(String::from)
        .to_vec();
        let check = |goal: &str, want: Result<usize, &str>| match (class_of(&classes, goal), want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{goal}"),
            (Err(e), Err(want)) => assert!(e.to_string().contains(want), "{goal}: {e}"),
            (got, want) => panic!("{goal}: {got:?}, wanted {want:?}"),
        };
        check("find the chair", Ok(1));
        check("Please go to a CHAIR.", Ok(1));
        check("chairs", Ok(1));
        check("find the couch", Ok(2));
        check("find a sofa", Ok(2));
        check("find the television", Ok(3));
        check("the TV", Ok(3));
        check("find the table", Ok(4));
        check("the dining tables", Ok(4));
        check("find the hot dog", Ok(5));
        check("find the dog", Ok(6));
        check("my mobile phone", Ok(7));
        check("the phone", Ok(7));
        check("buses", Ok(8));
        check("the red chair", Err("does not know \"red\""));
        check("the chiar", Err("the nearest word that it knows is \"chair\""));
        check("the fridge", Err("does not know \"fridge\""));
        check("the cup and the chair", Err("the goal names chair and cup"));
        check("go there", Err("names nothing"));
        check("", Err("names nothing"));
    }
}
