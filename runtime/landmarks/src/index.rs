//! Nearest descriptors without looking at all of them: locality-sensitive hashing by random hyperplanes (Charikar 2002),
//! of which also the nearest other buckets are probed (Lv et al. 2007). Of what lies there, only those are compared in full
//! that lie on the same side of most hyperplanes.

use crate::features::Descriptor;
use mindseye_base::random::Rng;

const TABLES: usize = 8;
const BITS: usize = 16;
/// Buckets looked at in each table besides the descriptor's own.
const PROBES: usize = 6;
const NONE: u32 = u32::MAX;
/// On which side of each hyperplane a descriptor lies, a bit each.
type Code = u128;
/// Descriptors on different sides of more hyperplanes are not compared: by chance it is half of them, and a quarter for such as
/// are 250 apart.
const SIDES_MAX: u32 = 50;

/// Descriptors by number, and which of them may be near another. Numbers are below the capacity.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    descriptors: Vec<Descriptor>,
    entries: Vec<Entry>,
    /// Offsets of the hyperplanes: medians of the first descriptors' projections, so that buckets are about as full.
    offsets: Option<[i32; TABLES * BITS]>,
    /// Signs of the hyperplanes' normals: `TABLES * BITS` rows of 128.
    planes: Vec<[i16; 128]>,
    /// First entry of each bucket.
    heads: Vec<u32>,
    query: u32,
}

/// What is read of an entry on the way through a bucket: one line of a cache.
#[derive(Clone, Debug)]
#[repr(align(64))]
struct Entry {
    code: Code,
    /// For each table, the next entry of the bucket.
    next: [u32; TABLES],
    /// Query in which the entry was last seen.
    stamp: u32,
}

impl Index {
    /// An empty index for at most `capacity` entries; all memory is taken here.
    pub(crate) fn new(capacity: usize) -> Self {
        let mut rng = Rng::new(0x6c61_6e64);
        // As many of each sign: descriptors have no negative values, and their common mean must not decide.
        let mut signs: [i16; 128] = std::array::from_fn(|k| if k % 2 == 0 { 1 } else { -1 });
        let planes = (0..TABLES * BITS)
            .map(|_| {
                rng.shuffle(&mut signs);
                signs
            })
            .collect();
        Self {
            descriptors: vec![Descriptor([0; 128]); capacity],
            entries: vec![Entry { code: 0, next: [NONE; TABLES], stamp: 0 }; capacity],
            offsets: None,
            planes,
            heads: vec![NONE; TABLES << BITS],
            query: 0,
        }
    }

    /// Sets the planes' offsets by a picture's descriptors; before the first entry, and then never again.
    pub(crate) fn learn(&mut self, descriptors: &[Descriptor]) {
        if self.offsets.is_some() || descriptors.is_empty() {
            return;
        }
        let all: Vec<_> = descriptors.iter().map(|d| self.projections(d)).collect();
        self.offsets = Some(std::array::from_fn(|p| {
            let mut column: Vec<i32> = all.iter().map(|a| a[p]).collect();
            column.sort_unstable();
            column[column.len() / 2]
        }));
    }

    pub(crate) fn descriptor(&self, entry: u32) -> &Descriptor {
        &self.descriptors[entry as usize]
    }

    /// Projections on the planes.
    fn projections(&self, descriptor: &Descriptor) -> [i32; TABLES * BITS] {
        let values: [i16; 128] = std::array::from_fn(|k| i16::from(descriptor.0[k]));
        let mut out: [i32; TABLES * BITS] = std::array::from_fn(|p| {
            let plane = &self.planes[p];
            values.iter().zip(plane).map(|(v, s)| i32::from(*v) * i32::from(*s)).sum()
        });
        if let Some(offsets) = &self.offsets {
            out.iter_mut().zip(offsets).for_each(|(v, o)| *v -= o);
        }
        out
    }

    fn sides(projections: &[i32; TABLES * BITS]) -> Code {
        projections.iter().enumerate().fold(0, |code, (k, v)| code | (Code::from(*v > 0) << k))
    }

    fn bucket(table: usize, projections: &[i32; TABLES * BITS]) -> usize {
        let own = &projections[table * BITS..(table + 1) * BITS];
        own.iter().enumerate().fold(0, |code, (k, v)| code | (usize::from(*v > 0) << k))
    }

    /// Adds an entry, which is not there yet.
    pub(crate) fn insert(&mut self, entry: u32, descriptor: &Descriptor) {
        self.descriptors[entry as usize] = *descriptor;
        let projections = self.projections(descriptor);
        self.entries[entry as usize].code = Self::sides(&projections);
        for table in 0..TABLES {
            let head = &mut self.heads[(table << BITS) + Self::bucket(table, &projections)];
            self.entries[entry as usize].next[table] = *head;
            *head = entry;
        }
    }

    /// Takes an entry out.
    pub(crate) fn remove(&mut self, entry: u32) {
        let projections = self.projections(&self.descriptors[entry as usize]);
        for table in 0..TABLES {
            let after = self.entries[entry as usize].next[table];
            let bucket = (table << BITS) + Self::bucket(table, &projections);
            if self.heads[bucket] == entry {
                self.heads[bucket] = after;
                continue;
            }
            let mut at = self.heads[bucket];
            while at != NONE {
                let next = &mut self.entries[at as usize].next[table];
                if *next == entry {
                    *next = after;
                    break;
                }
                at = *next;
            }
        }
    }

    /// Calls `take` once with each entry that may be near and its squared distance.
    pub(crate) fn near(&mut self, descriptor: &Descriptor, mut take: impl FnMut(u32, u32)) {
        self.query = self.query.wrapping_add(1);
        if self.query == 0 {
            self.entries.iter_mut().for_each(|e| e.stamp = 0);
            self.query = 1;
        }
        let projections = self.projections(descriptor);
        let sides = Self::sides(&projections);
        for table in 0..TABLES {
            let own = Self::bucket(table, &projections);
            let mut margins: [(i32, usize); BITS] =
                std::array::from_fn(|k| (projections[table * BITS + k].abs(), k));
            margins.sort_unstable();
            let flipped = margins.iter().take(PROBES).map(|(_, k)| own ^ (1 << k));
            for code in std::iter::once(own).chain(flipped) {
                let mut at = self.heads[(table << BITS) + code];
                while at != NONE {
                    let entry = &mut self.entries[at as usize];
                    if entry.stamp != self.query {
                        entry.stamp = self.query;
                        if (entry.code ^ sides).count_ones() <= SIDES_MAX {
                            take(at, self.descriptors[at as usize].distance(descriptor));
                        }
                    }
                    at = entry.next[table];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rng: &mut Rng) -> Descriptor {
        let values: Vec<f64> = (0..128).map(|_| rng.normal().abs()).collect();
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        Descriptor(std::array::from_fn(|k| (512.0 * values[k] / norm).min(255.0) as u8))
    }

    fn noisy(rng: &mut Rng, d: &Descriptor, sigma: f64) -> Descriptor {
        Descriptor(d.0.map(|v| (f64::from(v) + sigma * rng.normal()).clamp(0.0, 255.0) as u8))
    }

    #[test]
    fn near_descriptors_are_found_among_few() {
        let mut rng = Rng::new(1);
        let n = 5000;
        let all: Vec<Descriptor> = (0..n).map(|_| random(&mut rng)).collect();
        let mut index = Index::new(n);
        index.learn(&all[..200]);
        for (k, d) in all.iter().enumerate() {
            index.insert(k as u32, d);
        }
        let (mut found, mut looked) = (0, 0);
        for (k, descriptor) in all.iter().enumerate().take(300) {
            // About a third of the distance of unrelated ones.
            let query = noisy(&mut rng, descriptor, 15.0);
            let mut hit = false;
            index.near(&query, |e, _| {
                looked += 1;
                hit |= e as usize == k;
            });
            found += usize::from(hit);
        }
        assert!(found >= 255, "{found} of 300");
        assert!(looked / 300 < n / 4, "{} of {n} looked at", looked / 300);
    }

    #[test]
    fn entries_taken_out_are_gone_and_others_stay() {
        let mut rng = Rng::new(2);
        let all: Vec<Descriptor> = (0..50).map(|_| random(&mut rng)).collect();
        let mut index = Index::new(50);
        for (k, d) in all.iter().enumerate() {
            index.insert(k as u32, d);
        }
        for k in (0..50).step_by(2) {
            index.remove(k);
        }
        for (k, d) in all.iter().enumerate() {
            let mut hits = Vec::new();
            index.near(d, |e, _| hits.push(e as usize));
            assert_eq!(hits.contains(&k), k % 2 == 1, "entry {k}");
            assert!(hits.iter().all(|h| h % 2 == 1));
            assert_eq!(index.descriptor(k as u32), d);
        }
    }
}
