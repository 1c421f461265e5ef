//! Seeded houses: rooms, walls, doors and named objects.

use crate::decor::{Decor, decorate};
use crate::drive::DRIVE_MARGIN_M;
use crate::furniture::{self, Model};
use crate::plan::NavGrid;
use mindseye_base::random::Rng;
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// Radius of the robot's round base (m).
pub const ROBOT_RADIUS_M: f64 = 0.2;
/// Thickness of walls between rooms (m).
pub const WALL_THICKNESS_M: f64 = 0.14;
/// Height of the ceiling (m).
pub const CEILING_M: f64 = 2.6;
/// Height of door openings (m).
pub const DOOR_HEIGHT_M: f64 = 2.1;
/// Side of one cell of the floor's shading map (m).
pub(crate) const SHADE_CELL_M: f64 = 0.05;

/// The kinds of object: eight plain shapes, then what only furnished houses have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Four legs, a seat and a back.
    Chair,
    /// Four legs and a square top.
    Table,
    /// A thin post with a shade on top.
    Lamp,
    /// A dark pot with round foliage of the object's colour.
    Plant,
    /// A sphere.
    Ball,
    /// A cube.
    Box,
    /// A traffic cone.
    Cone,
    /// A low, long bed with a white pillow.
    Bed,
    /// A sofa.
    Couch,
    /// An armchair.
    Armchair,
    /// A writing desk.
    Desk,
    /// A refrigerator.
    Refrigerator,
    /// A television on a low board.
    Tv,
    /// A washbasin.
    Sink,
    /// A toilet.
    Toilet,
    /// An oven.
    Oven,
    /// A bookcase or shelves.
    Bookcase,
    /// A wardrobe.
    Wardrobe,
    /// A bench.
    Bench,
    /// A grand piano.
    Piano,
    /// A bedside table.
    Nightstand,
    /// A stool.
    Stool,
    /// A teddy bear.
    Teddy,
    /// A barrel.
    Barrel,
    /// A dustbin.
    Bin,
    /// A suitcase.
    Suitcase,
    /// An electric guitar on its stand.
    Guitar,
    /// A loudspeaker.
    Speaker,
    /// A folded umbrella.
    Umbrella,
    /// A whiteboard on wheels.
    Whiteboard,
    /// A cradle.
    Cradle,
    /// A radiator.
    Radiator,
}

impl Shape {
    /// The eight plain shapes, in index order.
    pub const PLAIN: [Self; 8] =
        [Self::Chair, Self::Table, Self::Lamp, Self::Plant, Self::Ball, Self::Box, Self::Cone, Self::Bed];

    /// All kinds, in index order; the plain ones come first.
    pub const ALL: [Self; 32] = ALL_SHAPES;

    /// The noun for it: one word, and COCO's class where it has one of a single word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        [
            "chair",
            "table",
            "lamp",
            "plant",
            "ball",
            "box",
            "cone",
            "bed",
            "couch",
            "armchair",
            "desk",
            "refrigerator",
            "tv",
            "sink",
            "toilet",
            "oven",
            "bookcase",
            "wardrobe",
            "bench",
            "piano",
            "nightstand",
            "stool",
            "teddy",
            "barrel",
            "bin",
            "suitcase",
            "guitar",
            "speaker",
            "umbrella",
            "whiteboard",
            "cradle",
            "radiator",
        ][self as usize]
    }

    /// The kind with this noun.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// Position in [`Shape::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

const ALL_SHAPES: [Shape; 32] = [
    Shape::Chair,
    Shape::Table,
    Shape::Lamp,
    Shape::Plant,
    Shape::Ball,
    Shape::Box,
    Shape::Cone,
    Shape::Bed,
    Shape::Couch,
    Shape::Armchair,
    Shape::Desk,
    Shape::Refrigerator,
    Shape::Tv,
    Shape::Sink,
    Shape::Toilet,
    Shape::Oven,
    Shape::Bookcase,
    Shape::Wardrobe,
    Shape::Bench,
    Shape::Piano,
    Shape::Nightstand,
    Shape::Stool,
    Shape::Teddy,
    Shape::Barrel,
    Shape::Bin,
    Shape::Suitcase,
    Shape::Guitar,
    Shape::Speaker,
    Shape::Umbrella,
    Shape::Whiteboard,
    Shape::Cradle,
    Shape::Radiator,
];

/// The six object colours. They are the primary and secondary colours, so that the set (and [`Palette::objects`])
/// is closed under permutations of the R, G and B channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Colour {
    /// R.
    Red,
    /// G.
    Green,
    /// B.
    Blue,
    /// R + G.
    Yellow,
    /// R + B.
    Purple,
    /// G + B.
    Cyan,
}

impl Colour {
    /// All colours, in index order.
    pub const ALL: [Self; 6] = [Self::Red, Self::Green, Self::Blue, Self::Yellow, Self::Purple, Self::Cyan];

    /// The adjective for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        ["red", "green", "blue", "yellow", "purple", "cyan"][self as usize]
    }

    /// Position in [`Colour::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The colour that this one becomes when output channel `c` takes input channel `perm[c]`.
    ///
    /// ```
    /// use mindseye_world::Colour;
    /// assert_eq!(Colour::Red.permuted([1, 2, 0]), Colour::Blue);
    /// ```
    #[must_use]
    pub fn permuted(self, perm: [usize; 3]) -> Self {
        const BITS: [[bool; 3]; 6] = [
            [true, false, false],
            [false, true, false],
            [false, false, true],
            [true, true, false],
            [true, false, true],
            [false, true, true],
        ];
        let mine = BITS[self.index()];
        let now = perm.map(|p| mine[p % 3]);
        Self::ALL.into_iter().find(|c| BITS[c.index()] == now).unwrap_or(self)
    }
}

/// How hard the world is.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Difficulty {
    /// Fewest and most rooms.
    pub rooms: (usize, usize),
    /// Shortest and longest side of a single room, and of a house's rooms on average (m); at least 3.6.
    pub room_side_m: (f64, f64),
    /// Fewest and most objects in a room.
    pub objects_per_room: (usize, usize),
    /// Walls with patterns instead of plain colours.
    pub textured_walls: bool,
    /// Probability that one pair of a room's objects shares its colour or its shape (never both).
    pub shared_pair: f64,
    /// Objects are scaled by a factor in this range.
    pub object_scale: (f64, f64),
    /// Furniture from models in textured rooms with windows and pictures, instead of the plain shapes.
    #[serde(default)]
    pub furnished: bool,
}

/// As derived, without `furnished` where it is false: the text is part of what kept examiners of plain worlds are
/// known by.
impl std::fmt::Debug for Difficulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Difficulty");
        out.field("rooms", &self.rooms)
            .field("room_side_m", &self.room_side_m)
            .field("objects_per_room", &self.objects_per_room)
            .field("textured_walls", &self.textured_walls)
            .field("shared_pair", &self.shared_pair)
            .field("object_scale", &self.object_scale);
        if self.furnished {
            out.field("furnished", &self.furnished);
        }
        out.finish()
    }
}

impl Difficulty {
    /// One room with four plain walls of distinct colours and 4 to 6 objects.
    #[must_use]
    pub fn plain() -> Self {
        Self {
            rooms: (1, 1),
            room_side_m: (4.2, 6.0),
            objects_per_room: (4, 6),
            textured_walls: false,
            shared_pair: 0.5,
            object_scale: (0.9, 1.1),
            furnished: false,
        }
    }

    /// Two to four rooms joined by doors, with patterned walls and 2 to 4 objects in each room.
    #[must_use]
    pub fn house() -> Self {
        Self {
            rooms: (2, 4),
            room_side_m: (4.2, 5.4),
            objects_per_room: (2, 4),
            textured_walls: true,
            shared_pair: 0.5,
            object_scale: (0.85, 1.15),
            furnished: false,
        }
    }

    /// One room with 5 to 8 pieces of furniture, textured floor and walls, windows, pictures and sun.
    #[must_use]
    pub fn furnished() -> Self {
        Self {
            rooms: (1, 1),
            room_side_m: (5.2, 6.8),
            objects_per_room: (5, 8),
            textured_walls: true,
            shared_pair: 0.5,
            object_scale: (0.94, 1.06),
            furnished: true,
        }
    }

    /// Two to four furnished rooms joined by doors, with 3 to 5 pieces of furniture in each.
    #[must_use]
    pub fn apartment() -> Self {
        Self { rooms: (2, 4), room_side_m: (5.0, 6.2), objects_per_room: (3, 5), ..Self::furnished() }
    }

    /// Names of the presets.
    pub const NAMES: [&'static str; 4] = ["plain", "house", "furnished", "apartment"];

    /// A preset by name, one of [`Difficulty::NAMES`].
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "plain" => Some(Self::plain()),
            "house" => Some(Self::house()),
            "furnished" => Some(Self::furnished()),
            "apartment" => Some(Self::apartment()),
            _ => None,
        }
    }

    /// The kinds of object that there may be.
    #[must_use]
    pub fn kinds(&self) -> &'static [Shape] {
        if self.furnished { furniture::kinds() } else { &Shape::PLAIN }
    }

    /// Nouns that a model of this world needs, in the order of [`Shape::index`]: up to the last kind that there may be.
    #[must_use]
    pub fn nouns(&self) -> &'static [Shape] {
        let last = self.kinds().iter().map(|k| k.index()).max().unwrap_or(0);
        &ALL_SHAPES[..=last]
    }
}

/// Colours by index (sRGB, 8 bits); rendering reads nothing else, so replacing entries recolours the world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Palette {
    /// Object colours by [`Colour::index`].
    pub objects: [[u8; 3]; 6],
    /// Wall colours; rooms refer to them by index.
    pub walls: [[u8; 3]; 10],
    /// Floor colours (light and dark tone); rooms refer to them by index.
    pub floors: [[[u8; 3]; 2]; 5],
    /// Dark wood, metal, white cloth, earthenware, ceiling, door frames.
    pub neutral: [[u8; 3]; 6],
}

impl Default for Palette {
    fn default() -> Self {
        const HI: u8 = 220;
        const LO: u8 = 46;
        Self {
            objects: [[HI, LO, LO], [LO, HI, LO], [LO, LO, HI], [HI, HI, LO], [HI, LO, HI], [LO, HI, HI]],
            walls: [
                [226, 219, 206],
                [116, 122, 134],
                [166, 190, 162],
                [208, 166, 158],
                [152, 176, 206],
                [208, 186, 140],
                [98, 92, 98],
                [148, 114, 98],
                [178, 164, 204],
                [120, 156, 152],
            ],
            floors: [
                [[176, 136, 98], [146, 108, 74]],
                [[196, 190, 180], [150, 146, 140]],
                [[128, 104, 86], [102, 80, 64]],
                [[168, 174, 180], [122, 130, 138]],
                [[188, 152, 126], [168, 128, 102]],
            ],
            neutral: [
                [92, 66, 48],
                [86, 88, 94],
                [236, 234, 228],
                [120, 84, 66],
                [238, 236, 230],
                [222, 216, 204],
            ],
        }
    }
}

/// Which palette entry a part of an object takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tint {
    Main,
    Light,
    Dark,
    Neutral(usize),
}

/// One convex primitive, in its object's frame (origin at the footprint's centre on the floor).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Solid {
    Cuboid {
        min: [f32; 3],
        max: [f32; 3],
    },
    /// Upright; radius `r0` at `z0` and `r1` at `z1`.
    Frustum {
        x: f32,
        y: f32,
        z0: f32,
        z1: f32,
        r0: f32,
        r1: f32,
    },
    Ellipsoid {
        c: [f32; 3],
        r: [f32; 3],
    },
}

impl Solid {
    pub(crate) fn bounds(&self) -> ([f32; 3], [f32; 3]) {
        match *self {
            Self::Cuboid { min, max } => (min, max),
            Self::Frustum { x, y, z0, z1, r0, r1 } => {
                let r = r0.max(r1);
                ([x - r, y - r, z0], [x + r, y + r, z1])
            }
            Self::Ellipsoid { c, r } => {
                ([c[0] - r[0], c[1] - r[1], c[2] - r[2]], [c[0] + r[0], c[1] + r[1], c[2] + r[2]])
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Part {
    pub(crate) solid: Solid,
    pub(crate) tint: Tint,
}

/// A named object standing on the floor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Object {
    /// What a person would call it: "red chair". Unique in its house.
    pub name: String,
    /// Its colour.
    pub colour: Colour,
    /// Its shape.
    pub shape: Shape,
    /// Centre of its bounding box in the map (m): `x`, `y`, and `z` above the floor.
    pub x: f64,
    /// See [`Object::x`].
    pub y: f64,
    /// See [`Object::x`].
    pub z: f64,
    /// Heading of its own x axis in the map (rad).
    pub yaw: f64,
    /// Extent along its own axes x, y, z (m).
    pub size: [f64; 3],
    /// Radius of the smallest circle about `(x, y)` that holds its footprint (m). Collisions use this circle for plain
    /// shapes, and the rectangle of `size` for furniture: see [`Object::distance`].
    pub radius: f64,
    /// Index of the room it stands in.
    pub room: usize,
    #[serde(skip)]
    pub(crate) parts: Vec<Part>,
    /// The model of a piece of furniture, and its scale.
    #[serde(skip)]
    pub(crate) mesh: Option<(&'static Model, f32)>,
}

impl Object {
    /// Distance of a floor point from the footprint (m), negative inside.
    #[must_use]
    pub fn distance(&self, x: f64, y: f64) -> f64 {
        let (dx, dy) = (x - self.x, y - self.y);
        if self.mesh.is_none() {
            return dx.hypot(dy) - self.radius;
        }
        let (s, c) = self.yaw.sin_cos();
        let lx = (c * dx + s * dy).abs() - self.size[0] * 0.5;
        let ly = (c * dy - s * dx).abs() - self.size[1] * 0.5;
        lx.max(0.0).hypot(ly.max(0.0)) + lx.max(ly).min(0.0)
    }

    /// Places along the footprint's edge, `n` on each of its four sides.
    fn edge(&self, n: usize) -> impl Iterator<Item = (f64, f64)> + '_ {
        let (s, c) = self.yaw.sin_cos();
        let (hx, hy) = (self.size[0] * 0.5, self.size[1] * 0.5);
        (0..4 * n).map(move |k| {
            let along = 2.0 * (k / 4) as f64 / n as f64 - 1.0;
            let (lx, ly) = [(along, -1.0), (1.0, along), (-along, 1.0), (-1.0, -along)][k % 4];
            let (lx, ly) = (lx * hx, ly * hy);
            (self.x + c * lx - s * ly, self.y + s * lx + c * ly)
        })
    }

    /// Distance between two footprints (m), to some centimetres; negative or zero where they overlap.
    fn gap(&self, other: &Self) -> f64 {
        let one = |a: &Self, b: &Self| a.edge(8).map(|p| b.distance(p.0, p.1)).fold(f64::MAX, f64::min);
        one(self, other).min(one(other, self))
    }
}

/// An axis-aligned rectangle on the floor (m).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rect {
    /// Smallest x.
    pub x0: f64,
    /// Smallest y.
    pub y0: f64,
    /// Largest x.
    pub x1: f64,
    /// Largest y.
    pub y1: f64,
}

impl Rect {
    /// Its centre.
    #[must_use]
    pub fn centre(&self) -> (f64, f64) {
        ((self.x0 + self.x1) * 0.5, (self.y0 + self.y1) * 0.5)
    }

    /// Width along x (m).
    #[must_use]
    pub fn width(&self) -> f64 {
        self.x1 - self.x0
    }

    /// Depth along y (m).
    #[must_use]
    pub fn depth(&self) -> f64 {
        self.y1 - self.y0
    }

    /// Whether the point is inside or on the edge.
    #[must_use]
    pub fn contains(&self, x: f64, y: f64) -> bool {
        x >= self.x0 && x <= self.x1 && y >= self.y0 && y <= self.y1
    }

    /// Distance from the point to the rectangle; 0 inside (m).
    #[must_use]
    pub fn distance(&self, x: f64, y: f64) -> f64 {
        let dx = (self.x0 - x).max(x - self.x1).max(0.0);
        let dy = (self.y0 - y).max(y - self.y1).max(0.0);
        dx.hypot(dy)
    }
}

/// Floor patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FloorPattern {
    /// Two-tone squares.
    Checker,
    /// Boards.
    Planks,
    /// Square tiles with joints.
    Tiles,
}

/// Wall patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WallPattern {
    /// One colour.
    Plain,
    /// Vertical stripes.
    Stripes,
    /// A darker panel below.
    Panel,
    /// Bricks.
    Bricks,
    /// Dots.
    Dots,
}

/// One rectangular room.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Room {
    /// Its inner floor.
    pub rect: Rect,
    /// Palette index of the wall at the east (+x), north (+y), west and south.
    pub wall_colour: [usize; 4],
    /// Pattern of each wall, in the same order.
    pub wall_pattern: [WallPattern; 4],
    /// Palette index of the floor.
    pub floor_colour: usize,
    /// Pattern of the floor.
    pub floor_pattern: FloorPattern,
    /// Side of one tile or board of the floor's pattern (m).
    pub floor_period_m: f64,
}

/// An opening between two rooms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Door {
    /// The rooms that it joins.
    pub rooms: (usize, usize),
    /// Its middle on the floor (m).
    pub x: f64,
    /// Its middle on the floor (m).
    pub y: f64,
    /// True when one passes it along x (its wall runs along y).
    pub along_x: bool,
    /// Clear width (m).
    pub width_m: f64,
}

/// A wall between rooms, or the lintel above a door.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Wall {
    pub(crate) rect: Rect,
    pub(crate) z0: f64,
}

/// A procedural house. Everything in it is a function of the seed and the difficulty.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct House {
    /// The seed it was made from.
    pub seed: u64,
    /// Inner outline; the map's origin is its centre.
    pub bounds: Rect,
    /// Its rooms.
    pub rooms: Vec<Room>,
    /// Openings between them.
    pub doors: Vec<Door>,
    /// Its objects. Instance id in a rendered frame is `1 + index`.
    pub objects: Vec<Object>,
    /// Colours by index.
    pub palette: Palette,
    #[serde(skip)]
    pub(crate) walls: Vec<Wall>,
    #[serde(skip)]
    pub(crate) shade: FloorShade,
    /// The look of furnished rooms.
    #[serde(skip)]
    pub(crate) decor: Option<Decor>,
    #[serde(skip)]
    nav: OnceLock<NavGrid>,
}

/// Contact shadows and corner darkening of the floor, 0 (dark) to 1.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FloorShade {
    pub(crate) cols: usize,
    pub(crate) rows: usize,
    pub(crate) cells: Vec<f32>,
}

impl House {
    /// Makes the house of this seed. Impossible wishes (a room too small for its objects) are met as far as they
    /// can be: fewer objects are placed, never overlapping ones.
    ///
    /// ```
    /// use mindseye_world::{Difficulty, House};
    /// let house = House::generate(1, &Difficulty::plain());
    /// assert_eq!(house.rooms.len(), 1);
    /// assert!(house.objects.iter().any(|o| !o.name.is_empty()));
    /// ```
    #[must_use]
    pub fn generate(seed: u64, difficulty: &Difficulty) -> Self {
        let mut rng = Rng::new(seed ^ 0x6d69_6e64_7365_7965);
        let (bounds, rects, walls, doors) = layout(&mut rng, difficulty);
        let rooms = rects.iter().map(|r| furnish_surfaces(&mut rng, difficulty, *r)).collect::<Vec<_>>();
        let mut objects = Vec::new();
        for attempt in 0..8 {
            objects.clear();
            let wanted = if difficulty.furnished {
                place_furniture(&mut rng, difficulty, &rooms, &doors, &mut objects)
            } else {
                place_objects(&mut rng, difficulty, &rooms, &doors, &mut objects)
            };
            if objects.len() == wanted || attempt == 7 {
                break;
            }
        }
        let mut house = Self {
            seed,
            bounds,
            rooms,
            doors,
            objects,
            palette: Palette::default(),
            walls,
            shade: FloorShade { cols: 0, rows: 0, cells: Vec::new() },
            decor: None,
            nav: OnceLock::new(),
        };
        house.shade = house.floor_shade();
        if difficulty.furnished {
            house.palette.objects = FURNISHED_COLOURS;
            house.decor = Some(decorate(&house));
        }
        house
    }

    /// The same house with one of its objects elsewhere in its room: at least `least_m` (m) from where it was if such a place
    /// is found, else as far as one is. None where it fits nowhere else.
    ///
    /// # Panics
    /// When there is no object of this index.
    #[must_use]
    pub fn with_moved(&self, object: usize, least_m: f64, rng: &mut Rng) -> Option<Self> {
        let was = &self.objects[object];
        let room = &self.rooms[was.room].rect;
        let beside = |(k, o): (usize, &Object)| (k != object && o.room == was.room).then(|| o.clone());
        let others: Vec<Object> = self.objects.iter().enumerate().filter_map(beside).collect();
        let mut farthest: Option<(f64, Object)> = None;
        for _ in 0..400 {
            let mut there = was.clone();
            let fits = if there.mesh.is_some() {
                stand_furniture(rng, room, &mut there);
                furniture_fits(&there, room, &others, &self.doors)
            } else {
                stand_shape(rng, room, &mut there);
                shape_fits(&there, room, &others, &self.doors)
            };
            let far = (there.x - was.x).hypot(there.y - was.y);
            if fits && farthest.as_ref().is_none_or(|(m, _)| *m < far) {
                farthest = Some((far, there));
                if far >= least_m {
                    break;
                }
            }
        }
        let mut house = Self { nav: OnceLock::new(), ..self.clone() };
        house.objects[object] = farthest?.1;
        house.shade = house.floor_shade();
        Some(house)
    }

    /// The planning grid of the robot with its margin, made at first use.
    pub fn nav(&self) -> &NavGrid {
        self.nav.get_or_init(|| NavGrid::new(self, ROBOT_RADIUS_M + DRIVE_MARGIN_M))
    }

    /// The kinds of object that a house like this may have.
    #[must_use]
    pub fn kinds(&self) -> &'static [Shape] {
        if self.decor.is_some() { furniture::kinds() } else { &Shape::PLAIN }
    }

    /// The room whose floor holds the point; none inside walls and doorways.
    #[must_use]
    pub fn room_at(&self, x: f64, y: f64) -> Option<usize> {
        self.rooms.iter().position(|r| r.rect.contains(x, y))
    }

    /// The object with this name ("red chair"), in any letter case.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        self.objects.iter().position(|o| o.name.eq_ignore_ascii_case(name.trim()))
    }

    /// Free space around a floor point: distance to the nearest wall or object (m), negative inside one. A robot of
    /// radius `r` fits where this is at least `r`.
    #[must_use]
    pub fn clearance(&self, x: f64, y: f64) -> f64 {
        let b = &self.bounds;
        let mut d = (x - b.x0).min(b.x1 - x).min(y - b.y0).min(b.y1 - y);
        for w in self.walls.iter().filter(|w| w.z0 == 0.0) {
            d = d.min(if w.rect.contains(x, y) { -WALL_THICKNESS_M } else { w.rect.distance(x, y) });
        }
        for o in &self.objects {
            d = d.min(o.distance(x, y));
        }
        d
    }

    /// Whether a disc of this radius can move straight between the two points without touching anything.
    #[must_use]
    pub fn segment_free(&self, a: (f64, f64), b: (f64, f64), radius_m: f64) -> bool {
        // Sphere marching: the clearance at a point is a free step from there.
        let length = (b.0 - a.0).hypot(b.1 - a.1);
        if !length.is_finite() {
            return false;
        }
        let mut s = 0.0;
        loop {
            let k = if length > 0.0 { (s / length).min(1.0) } else { 1.0 };
            let d = self.clearance(a.0 + (b.0 - a.0) * k, a.1 + (b.1 - a.1) * k) - radius_m;
            if d < 0.0 {
                return false;
            }
            if s >= length {
                return true;
            }
            s = (s + d.max(0.01)).min(length);
        }
    }

    /// Whether a straight line of sight at floor level between the points is free of walls (objects are ignored).
    #[must_use]
    pub fn walls_clear(&self, a: (f64, f64), b: (f64, f64)) -> bool {
        let (dx, dy) = (b.0 - a.0, b.1 - a.1);
        // Slab test of the segment against each wall's rectangle.
        let meets = |r: &Rect| {
            let (mut k0, mut k1) = (0.0f64, 1.0f64);
            for (o, d, lo, hi) in [(a.0, dx, r.x0, r.x1), (a.1, dy, r.y0, r.y1)] {
                if d == 0.0 {
                    if o < lo || o > hi {
                        return false;
                    }
                } else {
                    let (p, q) = ((lo - o) / d, (hi - o) / d);
                    k0 = k0.max(p.min(q));
                    k1 = k1.min(p.max(q));
                }
            }
            k0 <= k1
        };
        !self.walls.iter().any(|w| w.z0 == 0.0 && meets(&w.rect))
    }

    fn floor_shade(&self) -> FloorShade {
        let b = &self.bounds;
        let cols = (b.width() / SHADE_CELL_M).ceil() as usize + 1;
        let rows = (b.depth() / SHADE_CELL_M).ceil() as usize + 1;
        let mut cells = vec![1.0f32; cols * rows];
        // Corners between floor and wall.
        const REACH: f64 = 0.35;
        let dim = |d: f64| (0.80 + 0.20 * (d / REACH).clamp(0.0, 1.0).sqrt()) as f32;
        let column: Vec<f32> = (0..cols)
            .map(|i| {
                let x = i as f64 * SHADE_CELL_M;
                dim(x.min(b.width() - x))
            })
            .collect();
        for (j, row) in cells.chunks_exact_mut(cols).enumerate() {
            let y = j as f64 * SHADE_CELL_M;
            let edge = dim(y.min(b.depth() - y));
            for (c, col) in row.iter_mut().zip(&column) {
                *c = edge * col;
            }
        }
        let mut stamp = |x0: f64, y0: f64, x1: f64, y1: f64, value: &dyn Fn(f64, f64) -> f32| {
            let i0 = ((x0 - b.x0) / SHADE_CELL_M).floor().max(0.0) as usize;
            let j0 = ((y0 - b.y0) / SHADE_CELL_M).floor().max(0.0) as usize;
            let i1 = (((x1 - b.x0) / SHADE_CELL_M).ceil().max(0.0) as usize).min(cols - 1);
            let j1 = (((y1 - b.y0) / SHADE_CELL_M).ceil().max(0.0) as usize).min(rows - 1);
            for j in j0..=j1.max(j0).min(rows - 1) {
                for i in i0..=i1.max(i0).min(cols - 1) {
                    cells[j * cols + i] *=
                        value(b.x0 + i as f64 * SHADE_CELL_M, b.y0 + j as f64 * SHADE_CELL_M);
                }
            }
        };
        for w in self.walls.iter().filter(|w| w.z0 == 0.0) {
            let r = &w.rect;
            stamp(r.x0 - REACH, r.y0 - REACH, r.x1 + REACH, r.y1 + REACH, &|x, y| dim(r.distance(x, y)));
        }
        for o in &self.objects {
            // The blob follows the footprint: a rounded rectangle for square things, a circle for round ones.
            let (s, c) = o.yaw.sin_cos();
            let round = o.mesh.is_none() && matches!(o.shape, Shape::Ball | Shape::Plant | Shape::Lamp);
            let (hx, hy) = (o.size[0] * 0.5, o.size[1] * 0.5);
            let hover = match o.shape {
                Shape::Ball | Shape::Lamp => 0.55,
                _ if o.mesh.is_some() => 0.8,
                _ => 0.95,
            };
            let reach = 0.30;
            let e = o.radius + reach;
            stamp(o.x - e, o.y - e, o.x + e, o.y + e, &|x, y| {
                let (dx, dy) = (x - o.x, y - o.y);
                let d = if round {
                    dx.hypot(dy) - hx * hover
                } else {
                    let (lx, ly) =
                        ((c * dx + s * dy).abs() - hx * hover, (c * dy - s * dx).abs() - hy * hover);
                    lx.max(0.0).hypot(ly.max(0.0)) + lx.max(ly).min(0.0)
                };
                let k = ((d + 0.08) / (reach + 0.08)).clamp(0.0, 1.0) as f32;
                0.52 + 0.48 * k * k * (3.0 - 2.0 * k)
            });
        }
        FloorShade { cols, rows, cells }
    }
}

type Layout = (Rect, Vec<Rect>, Vec<Wall>, Vec<Door>);

fn layout(rng: &mut Rng, difficulty: &Difficulty) -> Layout {
    let (lo, hi) = difficulty.room_side_m;
    let (lo, hi) = (lo.max(3.6), hi.max(3.6));
    let rooms = rng.between(difficulty.rooms.0.max(1), difficulty.rooms.1.max(1)).min(9);
    for _ in 0..40 {
        let (width, depth) = match rooms {
            1 => (rng.range(lo, hi), rng.range(lo, hi)),
            2 => (rng.range(2.0 * lo, 2.0 * hi) + WALL_THICKNESS_M, rng.range(lo, hi)),
            _ => {
                let across = ((rooms as f64).sqrt().ceil()).max(2.0);
                let down = (rooms as f64 / across).ceil().max(2.0);
                (rng.range(across * lo, across * hi), rng.range(down * lo, down * hi))
            }
        };
        let turned = rng.chance(0.5);
        let (width, depth) = if turned { (depth, width) } else { (width, depth) };
        let bounds = Rect { x0: -width / 2.0, y0: -depth / 2.0, x1: width / 2.0, y1: depth / 2.0 };
        if let Some(done) = partition(rng, bounds, rooms, lo * 0.85) {
            return done;
        }
    }
    let side = rng.range(lo, hi);
    let bounds = Rect { x0: -side / 2.0, y0: -side / 2.0, x1: side / 2.0, y1: side / 2.0 };
    (bounds, vec![bounds], Vec::new(), Vec::new())
}

/// Splits the outline into rooms, always the longest one, and gives each dividing wall one door.
fn partition(rng: &mut Rng, bounds: Rect, rooms: usize, shortest: f64) -> Option<Layout> {
    let half = WALL_THICKNESS_M * 0.5;
    let mut rects = vec![bounds];
    // Dividing walls: along_x as for doors (the wall runs along y), its coordinate, and its extent.
    let mut cuts: Vec<(bool, f64, f64, f64)> = Vec::new();
    while rects.len() < rooms {
        let longest = |r: &Rect| r.width().max(r.depth());
        let k = (0..rects.len()).max_by(|&a, &b| longest(&rects[a]).total_cmp(&longest(&rects[b])))?;
        let r = rects[k];
        let along_x = r.width() >= r.depth();
        let (from, to) = if along_x { (r.x0, r.x1) } else { (r.y0, r.y1) };
        if to - from < 2.0 * shortest + WALL_THICKNESS_M {
            return None;
        }
        let ratio = rng.range(0.42, 0.58);
        let at = (from + (to - from) * ratio).clamp(from + shortest + half, to - shortest - half);
        let (mut a, mut b) = (r, r);
        if along_x {
            a.x1 = at - half;
            b.x0 = at + half;
            cuts.push((true, at, r.y0, r.y1));
        } else {
            a.y1 = at - half;
            b.y0 = at + half;
            cuts.push((false, at, r.x0, r.x1));
        }
        rects[k] = a;
        rects.push(b);
    }
    let mut walls = Vec::new();
    let mut doors = Vec::new();
    for (along_x, at, from, to) in cuts {
        let mut places = Vec::new();
        for (i, a) in rects.iter().enumerate() {
            for (j, b) in rects.iter().enumerate() {
                let (touch, lo, hi) = if along_x {
                    (
                        (a.x1 + half - at).abs() < 1e-9 && (b.x0 - half - at).abs() < 1e-9,
                        a.y0.max(b.y0),
                        a.y1.min(b.y1),
                    )
                } else {
                    (
                        (a.y1 + half - at).abs() < 1e-9 && (b.y0 - half - at).abs() < 1e-9,
                        a.x0.max(b.x0),
                        a.x1.min(b.x1),
                    )
                };
                if touch && lo >= from - 1e-9 && hi <= to + 1e-9 && hi - lo >= 2.0 {
                    places.push((i, j, lo, hi));
                }
            }
        }
        if places.is_empty() {
            return None;
        }
        let (i, j, lo, hi) = places[rng.below(places.len())];
        let width = rng.range(1.0, 1.3);
        let middle = rng.range(lo + width * 0.5 + 0.35, hi - width * 0.5 - 0.35);
        let (x, y) = if along_x { (at, middle) } else { (middle, at) };
        doors.push(Door { rooms: (i, j), x, y, along_x, width_m: width });
        let piece = |lo: f64, hi: f64| {
            if along_x {
                Rect { x0: at - half, y0: lo, x1: at + half, y1: hi }
            } else {
                Rect { x0: lo, y0: at - half, x1: hi, y1: at + half }
            }
        };
        walls.push(Wall { rect: piece(from, middle - width * 0.5), z0: 0.0 });
        walls.push(Wall { rect: piece(middle + width * 0.5, to), z0: 0.0 });
        walls.push(Wall { rect: piece(middle - width * 0.5, middle + width * 0.5), z0: DOOR_HEIGHT_M });
    }
    Some((bounds, rects, walls, doors))
}

fn furnish_surfaces(rng: &mut Rng, difficulty: &Difficulty, rect: Rect) -> Room {
    let mut order: Vec<usize> = (0..10).collect();
    rng.shuffle(&mut order);
    let patterns = [
        WallPattern::Plain,
        WallPattern::Stripes,
        WallPattern::Panel,
        WallPattern::Bricks,
        WallPattern::Dots,
    ];
    let mut wall_pattern = [WallPattern::Plain; 4];
    if difficulty.textured_walls {
        for p in &mut wall_pattern {
            *p = patterns[rng.below(patterns.len())];
        }
    }
    let floor_pattern = [FloorPattern::Checker, FloorPattern::Planks, FloorPattern::Tiles][rng.below(3)];
    let floor_period_m = match floor_pattern {
        FloorPattern::Planks => rng.range(0.16, 0.24),
        _ => rng.range(0.4, 0.6),
    };
    Room {
        rect,
        wall_colour: [order[0], order[1], order[2], order[3]],
        wall_pattern,
        floor_colour: rng.below(5),
        floor_pattern,
        floor_period_m,
    }
}

/// Fills `objects` and says how many were wanted.
fn place_objects(
    rng: &mut Rng,
    difficulty: &Difficulty,
    rooms: &[Room],
    doors: &[Door],
    objects: &mut Vec<Object>,
) -> usize {
    let mut wanted = 0;
    let mut used = [[false; 6]; 8];
    for (index, room) in rooms.iter().enumerate() {
        let n = rng.between(difficulty.objects_per_room.0, difficulty.objects_per_room.1);
        let share = rng.chance(difficulty.shared_pair) && n >= 2;
        let kinds = pick_kinds(rng, n, share, &Shape::PLAIN, &used);
        wanted += n;
        // Long things first: they are the hardest to place.
        let mut made: Vec<Object> = kinds
            .into_iter()
            .map(|(shape, colour)| {
                used[shape.index()][colour.index()] = true;
                make_object(rng, shape, colour, difficulty.object_scale, index)
            })
            .collect();
        made.sort_by(|a, b| b.radius.total_cmp(&a.radius));
        let first = objects.len();
        for mut object in made {
            for _ in 0..400 {
                stand_shape(rng, &room.rect, &mut object);
                if shape_fits(&object, &room.rect, &objects[first..], doors) {
                    objects.push(object);
                    break;
                }
            }
        }
        // The order in a house says nothing about sizes.
        let tail = &mut objects[first..];
        rng.shuffle(tail);
    }
    wanted
}

/// Tries a place for a plain shape: anywhere.
fn stand_shape(rng: &mut Rng, r: &Rect, object: &mut Object) {
    let inset = object.radius + 0.1;
    object.x = rng.range(r.x0 + inset, r.x1 - inset);
    object.y = rng.range(r.y0 + inset, r.y1 - inset);
}

fn shape_fits(object: &Object, r: &Rect, others: &[Object], doors: &[Door]) -> bool {
    let (cx, cy) = r.centre();
    // The middle third stays free for the sweep.
    let (mx, my) = (r.width() / 6.0, r.depth() / 6.0);
    let middle = Rect { x0: cx - mx, y0: cy - my, x1: cx + mx, y1: cy + my };
    middle.distance(object.x, object.y) >= object.radius
        && others
            .iter()
            .all(|o| (o.x - object.x).hypot(o.y - object.y) >= o.radius + object.radius + OBJECT_GAP_M)
        && doors
            .iter()
            .all(|d| (d.x - object.x).hypot(d.y - object.y) >= d.width_m * 0.5 + object.radius + 0.5)
}

/// Least gap between two objects' circles (m): a robot passes.
pub(crate) const OBJECT_GAP_M: f64 = 0.5;

fn pick_kinds(
    rng: &mut Rng,
    n: usize,
    share: bool,
    of: &[Shape],
    used: &[[bool; 6]],
) -> Vec<(Shape, Colour)> {
    let mut best: Vec<(Shape, Colour)> = Vec::new();
    for _ in 0..60 {
        let mut shapes = of.to_vec();
        let mut colours = Colour::ALL.to_vec();
        rng.shuffle(&mut shapes);
        rng.shuffle(&mut colours);
        let mut kinds: Vec<(Shape, Colour)> =
            (0..n).map(|i| (shapes[i % shapes.len()], colours[i % colours.len()])).collect();
        if share {
            // One pair agrees in one attribute and differs in the other.
            if rng.chance(0.5) {
                kinds[1].0 = kinds[0].0;
            } else {
                kinds[1].1 = kinds[0].1;
            }
        }
        kinds.dedup();
        let fresh =
            kinds.iter().enumerate().all(|(i, k)| !used[k.0.index()][k.1.index()] && !kinds[..i].contains(k));
        if fresh {
            return kinds;
        }
        if best.is_empty() {
            best = kinds;
        }
    }
    best.retain(|k| !used[k.0.index()][k.1.index()]);
    let mut kept: Vec<(Shape, Colour)> = Vec::new();
    for k in best {
        if !kept.contains(&k) {
            kept.push(k);
        }
    }
    kept
}

fn make_object(rng: &mut Rng, shape: Shape, colour: Colour, scale: (f64, f64), room: usize) -> Object {
    let k = rng.range(scale.0, scale.1);
    let mut parts = shape_parts(shape);
    for p in &mut parts {
        p.solid = scaled(p.solid, k as f32);
    }
    let (mut lo, mut hi) = ([f32::MAX; 3], [f32::MIN; 3]);
    let mut radius = 0.0f32;
    for p in &parts {
        let (a, b) = p.solid.bounds();
        for i in 0..3 {
            lo[i] = lo[i].min(a[i]);
            hi[i] = hi[i].max(b[i]);
        }
        radius = radius.max(match p.solid {
            Solid::Cuboid { min, max } => {
                let x = min[0].abs().max(max[0].abs());
                let y = min[1].abs().max(max[1].abs());
                x.hypot(y)
            }
            Solid::Frustum { x, y, r0, r1, .. } => x.hypot(y) + r0.max(r1),
            Solid::Ellipsoid { c, r } => c[0].hypot(c[1]) + r[0].max(r[1]),
        });
    }
    Object {
        name: format!("{} {}", colour.name(), shape.name()),
        colour,
        shape,
        x: 0.0,
        y: 0.0,
        z: f64::from(lo[2] + hi[2]) * 0.5,
        yaw: rng.range(-std::f64::consts::PI, std::f64::consts::PI),
        size: [f64::from(hi[0] - lo[0]), f64::from(hi[1] - lo[1]), f64::from(hi[2] - lo[2])],
        radius: f64::from(radius),
        room,
        parts,
        mesh: None,
    }
}

/// Object colours of furnished houses: softer than the plain ones, and as these closed under permutations of R, G and B.
const FURNISHED_COLOURS: [[u8; 3]; 6] =
    [[204, 58, 58], [58, 204, 58], [58, 58, 204], [204, 204, 58], [204, 58, 204], [58, 204, 204]];

/// Where a kind of furniture stands.
fn at_wall(shape: Shape) -> bool {
    matches!(
        shape,
        Shape::Bed
            | Shape::Couch
            | Shape::Desk
            | Shape::Refrigerator
            | Shape::Tv
            | Shape::Sink
            | Shape::Toilet
            | Shape::Oven
            | Shape::Bookcase
            | Shape::Wardrobe
            | Shape::Nightstand
            | Shape::Radiator
            | Shape::Bench
    )
}

fn make_furniture(
    rng: &mut Rng,
    shape: Shape,
    colour: Colour,
    scale: (f64, f64),
    room: usize,
) -> Option<Object> {
    let models: Vec<&'static Model> = furniture::shipped().iter().filter(|m| m.kind == shape).collect();
    let model = *models.get(rng.below(models.len().max(1)))?;
    let k = rng.range(scale.0, scale.1);
    let size = model.extent.map(|e| f64::from(e) * k);
    Some(Object {
        name: format!("{} {}", colour.name(), shape.name()),
        colour,
        shape,
        x: 0.0,
        y: 0.0,
        z: size[2] * 0.5,
        yaw: 0.0,
        size,
        radius: size[0].hypot(size[1]) * 0.5,
        room,
        parts: Vec::new(),
        mesh: Some((model, k as f32)),
    })
}

/// Fills `objects` with furniture, some of it along the walls, and says how much was wanted.
fn place_furniture(
    rng: &mut Rng,
    difficulty: &Difficulty,
    rooms: &[Room],
    doors: &[Door],
    objects: &mut Vec<Object>,
) -> usize {
    let kinds = difficulty.kinds();
    let mut wanted = 0;
    let mut used = vec![[false; 6]; Shape::ALL.len()];
    for (index, room) in rooms.iter().enumerate() {
        let n = rng.between(difficulty.objects_per_room.0, difficulty.objects_per_room.1).min(kinds.len());
        let share = rng.chance(difficulty.shared_pair) && n >= 2;
        let picked = pick_kinds(rng, n, share, kinds, &used);
        wanted += n;
        let mut made: Vec<Object> = Vec::new();
        for (shape, colour) in picked {
            used[shape.index()][colour.index()] = true;
            made.extend(make_furniture(rng, shape, colour, difficulty.object_scale, index));
        }
        made.sort_by(|a, b| b.radius.total_cmp(&a.radius));
        let first = objects.len();
        for mut object in made {
            for _ in 0..300 {
                stand_furniture(rng, &room.rect, &mut object);
                if furniture_fits(&object, &room.rect, &objects[first..], doors) {
                    objects.push(object);
                    break;
                }
            }
        }
        let tail = &mut objects[first..];
        rng.shuffle(tail);
    }
    wanted
}

/// Tries a place for a piece of furniture: its back to a wall, or anywhere.
fn stand_furniture(rng: &mut Rng, r: &Rect, object: &mut Object) {
    use std::f64::consts::{FRAC_PI_2, PI};
    let (hx, hy) = (object.size[0] * 0.5, object.size[1] * 0.5);
    if !at_wall(object.shape) {
        object.yaw = rng.range(-PI, PI);
        let inset = object.radius + 0.08;
        object.x = rng.range(r.x0 + inset, r.x1 - inset);
        object.y = rng.range(r.y0 + inset, r.y1 - inset);
        return;
    }
    let side = rng.below(4);
    // Its front looks away from the wall: east, north, west, south wall.
    object.yaw = [PI, -FRAC_PI_2, 0.0, FRAC_PI_2][side];
    let back = hx + rng.range(0.03, 0.08);
    let (lo, hi) = if side & 1 == 0 { (r.y0, r.y1) } else { (r.x0, r.x1) };
    let along = rng.range(lo + hy + 0.1, hi - hy - 0.1);
    (object.x, object.y) =
        [(r.x1 - back, along), (along, r.y1 - back), (r.x0 + back, along), (along, r.y0 + back)][side];
}

fn furniture_fits(object: &Object, r: &Rect, others: &[Object], doors: &[Door]) -> bool {
    let (cx, cy) = r.centre();
    let (mx, my) = (r.width() / 6.0, r.depth() / 6.0);
    // The middle third stays free for the sweep.
    let middle = Rect { x0: cx - mx, y0: cy - my, x1: cx + mx, y1: cy + my };
    object.edge(8).all(|(x, y)| middle.distance(x, y) > 0.0)
        && others.iter().all(|o| {
            let side_by_side = at_wall(object.shape) && at_wall(o.shape);
            object.gap(o) >= if side_by_side { 0.12 } else { OBJECT_GAP_M }
        })
        && doors.iter().all(|d| object.distance(d.x, d.y) >= d.width_m * 0.5 + 0.5)
}

fn scaled(solid: Solid, k: f32) -> Solid {
    match solid {
        Solid::Cuboid { min, max } => Solid::Cuboid { min: min.map(|v| v * k), max: max.map(|v| v * k) },
        Solid::Frustum { x, y, z0, z1, r0, r1 } => {
            Solid::Frustum { x: x * k, y: y * k, z0: z0 * k, z1: z1 * k, r0: r0 * k, r1: r1 * k }
        }
        Solid::Ellipsoid { c, r } => Solid::Ellipsoid { c: c.map(|v| v * k), r: r.map(|v| v * k) },
    }
}

/// The primitives of a shape at scale 1; all shapes are centred on their footprint.
fn shape_parts(shape: Shape) -> Vec<Part> {
    const WOOD: Tint = Tint::Neutral(0);
    const METAL: Tint = Tint::Neutral(1);
    const WHITE: Tint = Tint::Neutral(2);
    const CLAY: Tint = Tint::Neutral(3);
    let cuboid = |tint, x0: f32, x1: f32, y0: f32, y1: f32, z0: f32, z1: f32| Part {
        solid: Solid::Cuboid { min: [x0, y0, z0], max: [x1, y1, z1] },
        tint,
    };
    let frustum = |tint, x: f32, y: f32, z0: f32, z1: f32, r0: f32, r1: f32| Part {
        solid: Solid::Frustum { x, y, z0, z1, r0, r1 },
        tint,
    };
    let ball = |tint, c: [f32; 3], r: [f32; 3]| Part { solid: Solid::Ellipsoid { c, r }, tint };
    let legs = |tint, h: f32, half: f32, thick: f32| {
        [(-1.0f32, -1.0f32), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)].map(|(sx, sy)| {
            let (x, y) = (sx * (half - thick), sy * (half - thick));
            cuboid(tint, x - thick, x + thick, y - thick, y + thick, 0.0, h)
        })
    };
    match shape {
        Shape::Chair => {
            let mut p = legs(Tint::Dark, 0.46, 0.265, 0.035).to_vec();
            p.push(cuboid(Tint::Main, -0.27, 0.27, -0.27, 0.27, 0.46, 0.54));
            p.push(cuboid(Tint::Main, -0.27, -0.20, -0.27, 0.27, 0.60, 1.05));
            p.push(cuboid(Tint::Dark, -0.26, -0.21, -0.24, -0.19, 0.54, 0.60));
            p.push(cuboid(Tint::Dark, -0.26, -0.21, 0.19, 0.24, 0.54, 0.60));
            p
        }
        Shape::Table => {
            let mut p = legs(Tint::Dark, 0.62, 0.38, 0.04).to_vec();
            p.push(cuboid(Tint::Main, -0.42, 0.42, -0.42, 0.42, 0.62, 0.72));
            p
        }
        Shape::Lamp => vec![
            frustum(METAL, 0.0, 0.0, 0.0, 0.05, 0.18, 0.16),
            frustum(METAL, 0.0, 0.0, 0.05, 0.80, 0.042, 0.042),
            frustum(Tint::Main, 0.0, 0.0, 0.78, 1.16, 0.30, 0.17),
            ball(WHITE, [0.0, 0.0, 0.84], [0.08, 0.08, 0.08]),
        ],
        Shape::Plant => vec![
            frustum(CLAY, 0.0, 0.0, 0.0, 0.32, 0.15, 0.21),
            frustum(WOOD, 0.0, 0.0, 0.32, 0.60, 0.03, 0.025),
            ball(Tint::Main, [0.0, 0.0, 0.92], [0.20, 0.20, 0.22]),
            ball(Tint::Dark, [0.16, 0.05, 0.70], [0.17, 0.17, 0.14]),
            ball(Tint::Main, [-0.12, 0.14, 0.72], [0.17, 0.17, 0.15]),
            ball(Tint::Dark, [-0.06, -0.17, 0.68], [0.17, 0.16, 0.14]),
            ball(Tint::Main, [0.10, -0.10, 0.82], [0.15, 0.15, 0.13]),
        ],
        Shape::Ball => vec![ball(Tint::Main, [0.0, 0.0, 0.32], [0.32, 0.32, 0.32])],
        Shape::Box => vec![
            cuboid(Tint::Main, -0.28, 0.28, -0.28, 0.28, 0.0, 0.50),
            cuboid(Tint::Dark, -0.30, 0.30, -0.30, 0.30, 0.50, 0.58),
        ],
        Shape::Cone => vec![
            cuboid(Tint::Dark, -0.28, 0.28, -0.28, 0.28, 0.0, 0.06),
            frustum(Tint::Main, 0.0, 0.0, 0.06, 0.42, 0.25, 0.165),
            frustum(WHITE, 0.0, 0.0, 0.42, 0.58, 0.165, 0.127),
            frustum(Tint::Main, 0.0, 0.0, 0.58, 1.0, 0.127, 0.028),
        ],
        Shape::Bed => vec![
            cuboid(WOOD, -0.50, 0.50, -0.31, 0.31, 0.08, 0.20),
            cuboid(WOOD, -0.50, -0.44, -0.31, 0.31, 0.0, 0.62),
            cuboid(WOOD, 0.44, 0.50, -0.31, 0.31, 0.0, 0.34),
            cuboid(Tint::Main, -0.44, 0.44, -0.29, 0.29, 0.20, 0.36),
            ball(WHITE, [-0.31, 0.0, 0.38], [0.10, 0.21, 0.06]),
            cuboid(Tint::Light, -0.14, -0.04, -0.295, 0.295, 0.30, 0.368),
        ],
        // The other kinds are models.
        _ => Vec::new(),
    }
}
