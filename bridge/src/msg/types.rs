//! The types, one declaration each: the macro writes the struct and its CDR.

use super::RosType;
use crate::cdr::{CdrError, CdrErrorKind, CdrRead, CdrReader, CdrWrite, CdrWriter};
use crate::geometry::{Pose2, PoseError};
use crate::time::Timestamp;
use nalgebra::Isometry3;
use std::ops::Range;

/// `struct Name = "pkg/msg/Name" "hash" { field: Type, ... }`; the ROS name and hash only for types that
/// travel by themselves.
macro_rules! ros_types {
    ($(
        $(#[$doc:meta])*
        $name:ident $(<$life:lifetime>)? $(= $ros:literal $hash:literal)? {
            $( $(#[$fdoc:meta])* $field:ident : $ty:ty ),* $(,)?
        }
    )*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct $name $(<$life>)? {
            $( $(#[$fdoc])* pub $field: $ty, )*
        }
        ros_types!(@read $name $(<$life>)? { $($field: $ty),* });
        impl $(<$life>)? CdrWrite for $name $(<$life>)? {
            #[inline]
            fn write(&self, w: &mut CdrWriter) {
                $( self.$field.write(w); )*
            }
            fn size_hint(&self) -> usize {
                0 $( + self.$field.size_hint() + 4 )*
            }
        }
        $( ros_types!(@named $name $ros $hash); )?
    )*};
    (@read $name:ident { $($field:ident : $ty:ty),* }) => {
        impl<'a> CdrRead<'a> for $name {
            const MIN_BYTES: usize = 0 $( + <$ty as CdrRead<'a>>::MIN_BYTES )*;
            #[inline]
            fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
                Ok(Self { $( $field: r.field(stringify!($field))?, )* })
            }
        }
    };
    (@read $name:ident <$life:lifetime> { $($field:ident : $ty:ty),* }) => {
        impl<$life> CdrRead<$life> for $name<$life> {
            const MIN_BYTES: usize = 0 $( + <$ty as CdrRead<$life>>::MIN_BYTES )*;
            #[inline]
            fn read(r: &mut CdrReader<$life>) -> Result<Self, CdrError> {
                Ok(Self { $( $field: r.field(stringify!($field))?, )* })
            }
        }
        impl<$life> $name<$life> {
            /// Reads a whole message, borrowing from it.
            ///
            /// # Errors
            /// [`CdrError`] with the field and the offset.
            pub fn decode(message: &$life [u8]) -> Result<Self, CdrError> {
                let mut r = CdrReader::new(message)?;
                let value = Self::read(&mut r)?;
                r.finish()?;
                Ok(value)
            }

            /// The message as CDR, header included.
            #[must_use]
            pub fn encode(&self) -> Vec<u8> {
                let mut w = CdrWriter::with_capacity(self.size_hint());
                self.write(&mut w);
                w.finish()
            }
        }
    };
    (@named $name:ident $ros:literal $hash:literal) => {
        impl RosType for $name {
            const NAME: &'static str = $ros;
            const HASH: &'static str = concat!("RIHS01_", $hash);
        }
    };
}

ros_types! {
    /// builtin_interfaces/msg/Time.
    Time = "builtin_interfaces/msg/Time" "b106235e25a4c5ed35098aa0a61a3ee9c9b18d197f398b0e4206cea9acf9c197" {
        /// Seconds since the epoch.
        sec: i32,
        /// Nanoseconds, below 1e9.
        nanosec: u32,
    }
    /// builtin_interfaces/msg/Duration.
    RosDuration {
        /// Seconds.
        sec: i32,
        /// Nanoseconds, below 1e9.
        nanosec: u32,
    }
    /// std_msgs/msg/Header.
    Header = "std_msgs/msg/Header" "f49fb3ae2cf070f793645ff749683ac6b06203e41c891e17701b1cb597ce6a01" {
        /// Time of validity.
        stamp: Time,
        /// Frame of reference.
        frame_id: String,
    }
    /// std_msgs/msg/String.
    StringMsg = "std_msgs/msg/String" "df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18" {
        /// Text.
        data: String,
    }
    /// rosgraph_msgs/msg/Clock.
    Clock = "rosgraph_msgs/msg/Clock" "692f7a66e93a3c83e71765d033b60349ba68023a8c689a79e48078bcb5c58564" {
        /// Simulated time.
        clock: Time,
    }
    /// geometry_msgs/msg/Vector3.
    Vector3 {
        /// x.
        x: f64,
        /// y.
        y: f64,
        /// z.
        z: f64,
    }
    /// geometry_msgs/msg/Point, metres.
    Point {
        /// x.
        x: f64,
        /// y.
        y: f64,
        /// z.
        z: f64,
    }
    /// geometry_msgs/msg/Pose: position in metres, orientation a unit quaternion.
    Pose = "geometry_msgs/msg/Pose" "d501954e9476cea2996984e812054b68026ae0bfae789d9a10b23daf35cc90fa" {
        /// Metres.
        position: Point,
        /// Unit quaternion.
        orientation: Quaternion,
    }
    /// geometry_msgs/msg/PoseStamped.
    PoseStamped = "geometry_msgs/msg/PoseStamped" "10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8" {
        /// Stamp and frame.
        header: Header,
        /// The pose.
        pose: Pose,
    }
    /// geometry_msgs/msg/PoseWithCovariance.
    PoseWithCovariance {
        /// The pose.
        pose: Pose,
        /// Row-major x, y, z, rotations.
        covariance: Cov36,
    }
    /// geometry_msgs/msg/PoseWithCovarianceStamped.
    PoseWithCovarianceStamped = "geometry_msgs/msg/PoseWithCovarianceStamped" "26432f9803e43727d3c8f668d1fdb3c630f548af631e2f4e31382371bfea3b6e" {
        /// Stamp and frame.
        header: Header,
        /// Pose and covariance.
        pose: PoseWithCovariance,
    }
    /// geometry_msgs/msg/Transform.
    TransformMsg {
        /// Metres.
        translation: Vector3,
        /// Unit quaternion.
        rotation: Quaternion,
    }
    /// geometry_msgs/msg/TransformStamped: `frame_id` from `child_frame_id`.
    TransformStamped = "geometry_msgs/msg/TransformStamped" "0a241f87d04668d94099cbb5ba11691d5ad32c2f29682e4eb5653424bd275206" {
        /// Stamp and parent frame.
        header: Header,
        /// Child frame.
        child_frame_id: String,
        /// Parent from child.
        transform: TransformMsg,
    }
    /// tf2_msgs/msg/TFMessage.
    TFMessage = "tf2_msgs/msg/TFMessage" "e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087" {
        /// Transforms.
        transforms: Vec<TransformStamped>,
    }
    /// geometry_msgs/msg/Twist: m/s and rad/s.
    Twist = "geometry_msgs/msg/Twist" "9c45bf16fe0983d80e3cfe750d6835843d265a9a6c46bd2e609fcddde6fb8d2a" {
        /// m/s.
        linear: Vector3,
        /// rad/s.
        angular: Vector3,
    }
    /// geometry_msgs/msg/TwistStamped.
    TwistStamped = "geometry_msgs/msg/TwistStamped" "5f0fcd4f81d5d06ad9b4c4c63e3ea51b82d6ae4d0558f1d475229b1121db6f64" {
        /// Stamp and frame.
        header: Header,
        /// Velocity.
        twist: Twist,
    }
    /// geometry_msgs/msg/TwistWithCovariance.
    TwistWithCovariance {
        /// Velocity.
        twist: Twist,
        /// Row-major x, y, z, rotations.
        covariance: Cov36,
    }
    /// nav_msgs/msg/Odometry: pose in `frame_id`, twist in `child_frame_id`.
    Odometry = "nav_msgs/msg/Odometry" "3cc97dc7fb7502f8714462c526d369e35b603cfc34d946e3f2eda2766dfec6e0" {
        /// Stamp and frame of the pose.
        header: Header,
        /// The body.
        child_frame_id: String,
        /// Where the body is.
        pose: PoseWithCovariance,
        /// How it moves.
        twist: TwistWithCovariance,
    }
    /// nav_msgs/msg/Path.
    Path = "nav_msgs/msg/Path" "1957a5bb3cee5da65c4e52e52b65a93df227efce4c20f8458b36e73066ca334b" {
        /// Stamp and frame.
        header: Header,
        /// In order of travel.
        poses: Vec<PoseStamped>,
    }
    /// sensor_msgs/msg/RegionOfInterest.
    RegionOfInterest {
        /// Left column.
        x_offset: u32,
        /// Top row.
        y_offset: u32,
        /// Rows; 0 = the whole picture.
        height: u32,
        /// Columns; 0 = the whole picture.
        width: u32,
        /// Rectify only the region.
        do_rectify: bool,
    }
    /// sensor_msgs/msg/CameraInfo.
    CameraInfo = "sensor_msgs/msg/CameraInfo" "b3dfd68ff46c9d56c80fd3bd4ed22c7a4ddce8c8348f2f59c299e73118e7e275" {
        /// Stamp and optical frame.
        header: Header,
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
        /// `plumb_bob`, `rational_polynomial`, `equidistant`.
        distortion_model: String,
        /// Distortion coefficients.
        d: Vec<f64>,
        /// 3x3 intrinsics, row-major; k\[0\] = 0 means uncalibrated.
        k: [f64; 9],
        /// 3x3 rectification.
        r: [f64; 9],
        /// 3x4 projection.
        p: [f64; 12],
        /// 0 or 1 = none.
        binning_x: u32,
        /// 0 or 1 = none.
        binning_y: u32,
        /// Region read out.
        roi: RegionOfInterest,
    }
    /// sensor_msgs/msg/Image with its own pixels.
    Image {
        /// Stamp and optical frame.
        header: Header,
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
        /// `rgb8`, `bgr8`, `mono8`, `16UC1`, ...
        encoding: String,
        /// Byte order of samples wider than a byte.
        is_bigendian: u8,
        /// Bytes per row, padding included.
        step: u32,
        /// `step * height` bytes.
        data: Vec<u8>,
    }
    /// sensor_msgs/msg/CompressedImage with its own bytes.
    CompressedImage {
        /// Stamp and optical frame.
        header: Header,
        /// Free text; sniff the bytes instead.
        format: String,
        /// JPEG, PNG, ...
        data: Vec<u8>,
    }
    /// std_msgs/msg/Header, its text borrowed.
    HeaderView<'a> {
        /// Time of validity.
        stamp: Time,
        /// Frame of reference.
        frame_id: &'a str,
    }
    /// sensor_msgs/msg/Image, borrowed from the message: nothing is copied or allocated.
    ImageView<'a> {
        /// Stamp and optical frame.
        header: HeaderView<'a>,
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
        /// `rgb8`, `bgr8`, `mono8`, `16UC1`, ...
        encoding: &'a str,
        /// Byte order of samples wider than a byte.
        is_bigendian: u8,
        /// Bytes per row, padding included.
        step: u32,
        /// `step * height` bytes, if the sender is honest.
        data: &'a [u8],
    }
    /// sensor_msgs/msg/CompressedImage, borrowed from the message.
    CompressedImageView<'a> {
        /// Stamp and optical frame.
        header: HeaderView<'a>,
        /// Free text; sniff the bytes instead.
        format: &'a str,
        /// JPEG, PNG, ...
        data: &'a [u8],
    }
    /// diagnostic_msgs/msg/KeyValue.
    KeyValue {
        /// Name.
        key: String,
        /// Value.
        value: String,
    }
    /// diagnostic_msgs/msg/DiagnosticStatus.
    DiagnosticStatus {
        /// 0 ok, 1 warn, 2 error, 3 stale.
        level: u8,
        /// Component.
        name: String,
        /// One line.
        message: String,
        /// Hardware.
        hardware_id: String,
        /// Details.
        values: Vec<KeyValue>,
    }
    /// diagnostic_msgs/msg/DiagnosticArray.
    DiagnosticArray = "diagnostic_msgs/msg/DiagnosticArray" "5a8a36efb05fb25070fa0fb3810290c0e6cd4862b54a8fb975a1ee8dc55a333e" {
        /// Stamp.
        header: Header,
        /// One per component.
        status: Vec<DiagnosticStatus>,
    }
    /// vision_msgs/msg/Point2D, pixels.
    Point2D {
        /// x.
        x: f64,
        /// y.
        y: f64,
    }
    /// vision_msgs/msg/Pose2D, pixels and radians.
    Pose2D {
        /// Pixels.
        position: Point2D,
        /// Radians.
        theta: f64,
    }
    /// vision_msgs/msg/BoundingBox2D, pixels.
    BoundingBox2D {
        /// Centre.
        center: Pose2D,
        /// Width.
        size_x: f64,
        /// Height.
        size_y: f64,
    }
    /// vision_msgs/msg/ObjectHypothesis.
    ObjectHypothesis {
        /// Class.
        class_id: String,
        /// 0 to 1.
        score: f64,
    }
    /// vision_msgs/msg/ObjectHypothesisWithPose.
    ObjectHypothesisWithPose {
        /// Class and score.
        hypothesis: ObjectHypothesis,
        /// Where.
        pose: PoseWithCovariance,
    }
    /// vision_msgs/msg/Detection2D.
    Detection2D = "vision_msgs/msg/Detection2D" "0d12b69df5c593b3455b7346fac8205437a7d4bcb09b9e0e0b2dde787ded38ea" {
        /// Stamp and frame of the picture.
        header: Header,
        /// What it may be.
        results: Vec<ObjectHypothesisWithPose>,
        /// Where in the picture.
        bbox: BoundingBox2D,
        /// Identity across pictures.
        id: String,
    }
    /// vision_msgs/msg/Detection2DArray.
    Detection2DArray = "vision_msgs/msg/Detection2DArray" "214274120007f4a683866481336b70310268cfa107aebe9d594a6acf75bda968" {
        /// Stamp and frame of the picture.
        header: Header,
        /// All of them.
        detections: Vec<Detection2D>,
    }
    /// action_msgs/msg/GoalInfo.
    GoalInfo {
        /// UUID.
        goal_id: [u8; 16],
        /// When it was accepted.
        stamp: Time,
    }
    /// action_msgs/msg/GoalStatus.
    GoalStatus {
        /// Which goal.
        goal_info: GoalInfo,
        /// 1 accepted, 2 executing, 3 canceling, 4 succeeded, 5 canceled, 6 aborted.
        status: i8,
    }
    /// action_msgs/msg/GoalStatusArray.
    GoalStatusArray = "action_msgs/msg/GoalStatusArray" "6c1684b00f177d37438febe6e709fc4e2b0d4248dca4854946f9ed8b30cda83e" {
        /// Every goal known to the server.
        status_list: Vec<GoalStatus>,
    }
    /// Request of action_msgs/srv/CancelGoal. All zeros cancels every goal.
    CancelGoalRequest = "action_msgs/srv/CancelGoal" "573d8b0a534451d7bc2ac8c5ffde8ac14b8593b7001175d0cd6516dcbeb8689a" {
        /// Which goal.
        goal_info: GoalInfo,
    }
    /// Response of action_msgs/srv/CancelGoal.
    CancelGoalResponse = "action_msgs/srv/CancelGoal" "573d8b0a534451d7bc2ac8c5ffde8ac14b8593b7001175d0cd6516dcbeb8689a" {
        /// 0 none, 1 rejected, 2 unknown goal, 3 goal already over.
        return_code: i8,
        /// Goals being cancelled.
        goals_canceling: Vec<GoalInfo>,
    }
    /// Request of NavigateToPose's send_goal service.
    NavigateSendGoalRequest = "nav2_msgs/action/NavigateToPose_SendGoal" "a4fcb3bee1bf32e21a0e541a943b221aa0826996e2c98f079b47022b256f48b5" {
        /// UUID.
        goal_id: [u8; 16],
        /// Where to.
        pose: PoseStamped,
        /// Path of a behaviour tree; empty = the default.
        behavior_tree: String,
    }
    /// Response of NavigateToPose's send_goal service.
    NavigateSendGoalResponse = "nav2_msgs/action/NavigateToPose_SendGoal" "a4fcb3bee1bf32e21a0e541a943b221aa0826996e2c98f079b47022b256f48b5" {
        /// Whether it drives.
        accepted: bool,
        /// When.
        stamp: Time,
    }
    /// Request of NavigateToPose's get_result service.
    NavigateGetResultRequest = "nav2_msgs/action/NavigateToPose_GetResult" "c407920357d566771e8882b4ef4d1f1a84ee922d609920ccd57faa6d6e391dc5" {
        /// UUID.
        goal_id: [u8; 16],
    }
}

impl RosType for Image {
    const NAME: &'static str = "sensor_msgs/msg/Image";
    const HASH: &'static str = "RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47";

    fn encode_split(mut self) -> (Vec<u8>, Vec<u8>) {
        let data = std::mem::take(&mut self.data);
        let mut w = CdrWriter::with_capacity(self.size_hint());
        self.header.write(&mut w);
        self.height.write(&mut w);
        self.width.write(&mut w);
        self.encoding.write(&mut w);
        self.is_bigendian.write(&mut w);
        self.step.write(&mut w);
        w.count(data.len());
        (w.finish(), data)
    }

    fn decode_pieces(pieces: &mut dyn Iterator<Item = &[u8]>, total: usize) -> Pieced<Self> {
        let Some(first) = pieces.next() else { return Pieced::Gather };
        match ImageView::head(first, total) {
            Ok(Some((v, range))) => Pieced::Done(Self {
                header: v.header.to_owned(),
                height: v.height,
                width: v.width,
                encoding: v.encoding.to_owned(),
                is_bigendian: v.is_bigendian,
                step: v.step,
                data: collect(first, pieces, &range),
            }),
            Ok(None) => Pieced::Gather,
            Err(e) => Pieced::Failed(e),
        }
    }
}

impl RosType for CompressedImage {
    const NAME: &'static str = "sensor_msgs/msg/CompressedImage";
    const HASH: &'static str = "RIHS01_15640771531571185e2efc8a100baf923961a4d15d5569652e6cb6691e8e371a";

    fn encode_split(mut self) -> (Vec<u8>, Vec<u8>) {
        let data = std::mem::take(&mut self.data);
        let mut w = CdrWriter::with_capacity(self.size_hint());
        self.header.write(&mut w);
        self.format.write(&mut w);
        w.count(data.len());
        (w.finish(), data)
    }

    fn decode_pieces(pieces: &mut dyn Iterator<Item = &[u8]>, total: usize) -> Pieced<Self> {
        let Some(first) = pieces.next() else { return Pieced::Gather };
        match CompressedImageView::head(first, total) {
            Ok(Some((view, range))) => {
                let data = collect(first, pieces, &range);
                Pieced::Done(Self { header: view.header.to_owned(), format: view.format.to_owned(), data })
            }
            Ok(None) => Pieced::Gather,
            Err(e) => Pieced::Failed(e),
        }
    }
}

/// What came of reading a message that lies in several pieces.
#[derive(Debug)]
pub enum Pieced<T> {
    /// The message.
    Done(T),
    /// It is none.
    Failed(CdrError),
    /// Put the pieces together and decode that.
    Gather,
}

/// The bytes `range` of a message whose first piece is `first`.
fn collect(first: &[u8], rest: &mut dyn Iterator<Item = &[u8]>, range: &Range<usize>) -> Vec<u8> {
    let mut out = Vec::with_capacity(range.len());
    out.extend_from_slice(&first[range.start..range.end.min(first.len())]);
    for piece in rest {
        let want = range.len() - out.len();
        out.extend_from_slice(&piece[..want.min(piece.len())]);
    }
    out
}

impl HeaderView<'_> {
    /// With its own text.
    #[must_use]
    pub fn to_owned(&self) -> Header {
        Header { stamp: self.stamp.clone(), frame_id: self.frame_id.to_owned() }
    }
}

/// Reads up to the length of `data`, which ends the message, and gives where in the message its bytes lie.
/// `None`: the first piece ends too early.
fn head<'a, T>(
    first: &'a [u8],
    total: usize,
    fields: impl FnOnce(&mut CdrReader<'a>) -> Result<T, CdrError>,
) -> Result<Option<(T, Range<usize>)>, CdrError> {
    let short = |e: CdrError| match e.kind {
        CdrErrorKind::Short { .. } | CdrErrorKind::TooMany { .. } if first.len() < total => Ok(None),
        _ => Err(e),
    };
    let mut r = match CdrReader::new(first) {
        Ok(r) => r,
        Err(e) => return short(e),
    };
    let read = fields(&mut r).and_then(|view| Ok((view, r.field::<u32>("data")? as usize)));
    let (view, count) = match read {
        Ok(done) => done,
        Err(e) => return short(e),
    };
    let start = first.len() - r.left();
    let left = total.saturating_sub(start);
    let error = |kind| CdrError { field: "data".into(), offset: start, kind };
    if count > left {
        return Err(error(CdrErrorKind::TooMany { count, left }));
    }
    if left - count > crate::cdr::MAX_TRAILING {
        return Err(error(CdrErrorKind::Trailing(left - count)));
    }
    Ok(Some((view, start..start + count)))
}

impl<'a> CompressedImageView<'a> {
    /// Reads the fields before the picture out of the first piece of a message of `total` bytes, and tells
    /// where in the message the picture lies; `data` stays empty. `None`: the piece ends too early.
    ///
    /// # Errors
    /// [`CdrError`], as for the whole message.
    pub fn head(first: &'a [u8], total: usize) -> Result<Option<(Self, Range<usize>)>, CdrError> {
        head(first, total, |r| Ok(Self { header: r.field("header")?, format: r.field("format")?, data: &[] }))
    }
}

impl<'a> ImageView<'a> {
    /// As [`CompressedImageView::head`].
    ///
    /// # Errors
    /// [`CdrError`], as for the whole message.
    pub fn head(first: &'a [u8], total: usize) -> Result<Option<(Self, Range<usize>)>, CdrError> {
        head(first, total, |r| {
            Ok(Self {
                header: r.field("header")?,
                height: r.field("height")?,
                width: r.field("width")?,
                encoding: r.field("encoding")?,
                is_bigendian: r.field("is_bigendian")?,
                step: r.field("step")?,
                data: &[],
            })
        })
    }
}

/// Response of NavigateToPose's get_result service. Humble's result is empty (one dummy byte): the error
/// fields are then 0 and "".
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NavigateGetResultResponse {
    /// 4 succeeded, 5 canceled, 6 aborted.
    pub status: i8,
    /// 0 = none.
    pub error_code: u16,
    /// For a person.
    pub error_msg: String,
}

impl<'a> CdrRead<'a> for NavigateGetResultResponse {
    const MIN_BYTES: usize = 1;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        let status = r.field("status")?;
        if r.left() <= 3 {
            return Ok(Self { status, ..Self::default() });
        }
        Ok(Self { status, error_code: r.field("error_code")?, error_msg: r.field("error_msg")? })
    }
}

impl CdrWrite for NavigateGetResultResponse {
    fn write(&self, w: &mut CdrWriter) {
        w.i8(self.status);
        w.u16(self.error_code);
        w.str(&self.error_msg);
    }
}

impl RosType for NavigateGetResultResponse {
    const NAME: &'static str = "nav2_msgs/action/NavigateToPose_GetResult";
    const HASH: &'static str = NavigateGetResultRequest::HASH;
}

/// NavigateToPose's feedback: the fields that every distribution has. Newer ones append more, which are
/// ignored.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NavigateFeedback {
    /// UUID of the goal.
    pub goal_id: [u8; 16],
    /// Where the robot is.
    pub current_pose: PoseStamped,
    /// Since the start.
    pub navigation_time: RosDuration,
    /// To the end.
    pub estimated_time_remaining: RosDuration,
    /// So far.
    pub number_of_recoveries: i16,
    /// Metres along the path.
    pub distance_remaining: f32,
}

impl<'a> CdrRead<'a> for NavigateFeedback {
    const MIN_BYTES: usize = 16;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        Ok(Self {
            goal_id: r.field("goal_id")?,
            current_pose: r.field("current_pose")?,
            navigation_time: r.field("navigation_time")?,
            estimated_time_remaining: r.field("estimated_time_remaining")?,
            number_of_recoveries: r.field("number_of_recoveries")?,
            distance_remaining: r.field("distance_remaining")?,
        })
    }
}

impl CdrWrite for NavigateFeedback {
    fn write(&self, w: &mut CdrWriter) {
        self.goal_id.write(w);
        self.current_pose.write(w);
        self.navigation_time.write(w);
        self.estimated_time_remaining.write(w);
        w.i16(self.number_of_recoveries);
        w.f32(self.distance_remaining);
    }
}

impl RosType for NavigateFeedback {
    const NAME: &'static str = "nav2_msgs/action/NavigateToPose_FeedbackMessage";
    /// Jazzy's and Kilted's; Lyrical's differs (read it from the robot's tokens).
    const HASH: &'static str = "RIHS01_9d1f6fa2eb975ce733b419ac2e97b134d8ff92b6478b6559feed9a50bdfd82b3";
    const OPEN_ENDED: bool = true;
}

/// A 6x6 covariance on the wire. Its own type because the standard library has defaults for short arrays
/// only.
#[derive(Debug, Clone, PartialEq)]
pub struct Cov36(pub [f64; 36]);

impl Default for Cov36 {
    fn default() -> Self {
        Self([0.0; 36])
    }
}

impl<'a> CdrRead<'a> for Cov36 {
    const MIN_BYTES: usize = 36 * 8;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        <[f64; 36]>::read(r).map(Self)
    }
}

impl CdrWrite for Cov36 {
    fn write(&self, w: &mut CdrWriter) {
        self.0.write(w);
    }
    fn size_hint(&self) -> usize {
        36 * 8
    }
}

impl From<crate::geometry::Covariance6> for Cov36 {
    fn from(c: crate::geometry::Covariance6) -> Self {
        Self(c.0)
    }
}

/// geometry_msgs/msg/Quaternion. Its default is the identity (w = 1), as the .msg file has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quaternion {
    /// x.
    pub x: f64,
    /// y.
    pub y: f64,
    /// z.
    pub z: f64,
    /// Real part.
    pub w: f64,
}

impl Default for Quaternion {
    fn default() -> Self {
        Self { x: 0.0, y: 0.0, z: 0.0, w: 1.0 }
    }
}

impl<'a> CdrRead<'a> for Quaternion {
    const MIN_BYTES: usize = 32;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        Ok(Self { x: r.field("x")?, y: r.field("y")?, z: r.field("z")?, w: r.field("w")? })
    }
}

impl CdrWrite for Quaternion {
    fn write(&self, w: &mut CdrWriter) {
        [self.x, self.y, self.z, self.w].write(w);
    }
    fn size_hint(&self) -> usize {
        32
    }
}

impl Time {
    /// As nanoseconds since the epoch.
    #[must_use]
    pub fn timestamp(&self) -> Timestamp {
        Timestamp::from_ros(self.sec, self.nanosec)
    }
}

impl From<Timestamp> for Time {
    fn from(t: Timestamp) -> Self {
        let (sec, nanosec) = t.to_ros();
        Self { sec, nanosec }
    }
}

impl Header {
    /// A header.
    #[must_use]
    pub fn new(stamp: Timestamp, frame_id: impl Into<String>) -> Self {
        Self { stamp: stamp.into(), frame_id: frame_id.into() }
    }
}

impl Pose {
    /// From `frame_from_body`.
    #[must_use]
    pub fn from_isometry(iso: &Isometry3<f64>) -> Self {
        let t = iso.translation.vector;
        let q = iso.rotation.coords;
        Self {
            position: Point { x: t.x, y: t.y, z: t.z },
            orientation: Quaternion { x: q.x, y: q.y, z: q.z, w: q.w },
        }
    }

    /// A planar pose: z = 0, rotation about z only.
    #[must_use]
    pub fn from_pose2(p: Pose2) -> Self {
        let (s, c) = (p.yaw / 2.0).sin_cos();
        Self {
            position: Point { x: p.x, y: p.y, z: 0.0 },
            orientation: Quaternion { x: 0.0, y: 0.0, z: s, w: c },
        }
    }

    /// As `frame_from_body`.
    ///
    /// # Errors
    /// [`PoseError`] when a number is not finite or the quaternion's norm is not 1.
    pub fn isometry(&self) -> Result<Isometry3<f64>, PoseError> {
        let (p, q) = (&self.position, &self.orientation);
        crate::geometry::isometry([p.x, p.y, p.z], [q.x, q.y, q.z, q.w])
    }
}

impl TransformStamped {
    /// `frame_from_child` at a stamp.
    #[must_use]
    pub fn new(stamp: Timestamp, frame: &str, child: &str, frame_from_child: &Isometry3<f64>) -> Self {
        let pose = Pose::from_isometry(frame_from_child);
        Self {
            header: Header::new(stamp, frame),
            child_frame_id: child.to_owned(),
            transform: TransformMsg {
                translation: Vector3 { x: pose.position.x, y: pose.position.y, z: pose.position.z },
                rotation: pose.orientation,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msg::{dds_name, ros_name, type_hash};

    fn round_trip<T: RosType + Clone + PartialEq + std::fmt::Debug>(value: &T) {
        let bytes = value.encode();
        assert_eq!(&T::decode(&bytes).unwrap(), value);
        let (head, tail) = value.clone().encode_split();
        assert_eq!([head, tail].concat(), bytes, "{}", T::NAME);
        assert!(bytes.len() <= 4 + value.size_hint() + 64, "{}: {}", T::NAME, bytes.len());
        // Cut short it is refused; the one type with a shorter older form starts where that form ends.
        let from = if T::NAME.ends_with("GetResult") { 9 } else { 0 };
        for cut in from..bytes.len() {
            assert!(T::decode(&bytes[..cut]).is_err(), "{} at {cut}", T::NAME);
        }
    }

    #[test]
    fn pose_stamped_is_76_bytes() {
        let p = PoseStamped { header: Header::new(Timestamp(1), "map"), ..Default::default() };
        assert_eq!(p.encode().len(), 76);
        round_trip(&p);
    }

    #[test]
    fn all_types_round_trip() {
        let header = Header::new(Timestamp(1_764_000_000_123_456_789), "camera_optical_frame");
        round_trip(&StringMsg { data: "grün".into() });
        round_trip(&Clock { clock: Time { sec: 5, nanosec: 6 } });
        round_trip(&TFMessage {
            transforms: vec![
                TransformStamped::new(
                    Timestamp(5),
                    "odom",
                    "base_link",
                    &Isometry3::translation(1.0, 2.0, 3.0),
                ),
                TransformStamped::default(),
            ],
        });
        round_trip(&Odometry { header: header.clone(), child_frame_id: "base".into(), ..Default::default() });
        round_trip(&Path { header: header.clone(), poses: vec![PoseStamped::default(); 3] });
        round_trip(&CameraInfo { header: header.clone(), d: vec![0.1; 5], ..Default::default() });
        round_trip(&Image {
            header: header.clone(),
            encoding: "rgb8".into(),
            data: vec![1; 12],
            ..Default::default()
        });
        round_trip(&CompressedImage { header: header.clone(), format: "jpeg".into(), data: vec![9; 5] });
        round_trip(&DiagnosticArray {
            header: header.clone(),
            status: vec![DiagnosticStatus {
                level: 2,
                values: vec![KeyValue { key: "k".into(), value: "v".into() }],
                ..Default::default()
            }],
        });
        round_trip(&Detection2DArray {
            header: header.clone(),
            detections: vec![Detection2D {
                results: vec![ObjectHypothesisWithPose::default()],
                id: "7".into(),
                ..Default::default()
            }],
        });
        round_trip(&GoalStatusArray { status_list: vec![GoalStatus { status: 4, ..Default::default() }] });
        round_trip(&PoseWithCovarianceStamped { header: header.clone(), ..Default::default() });
        round_trip(&TwistStamped { header, ..Default::default() });
        round_trip(&Twist::default());
        round_trip(&CancelGoalResponse { return_code: 1, goals_canceling: vec![GoalInfo::default()] });
        round_trip(&NavigateSendGoalRequest { behavior_tree: "t".into(), ..Default::default() });
        round_trip(&NavigateSendGoalResponse { accepted: true, ..Default::default() });
        round_trip(&NavigateGetResultResponse { status: 6, error_code: 901, error_msg: "no path".into() });
        round_trip(&NavigateFeedback {
            number_of_recoveries: 2,
            distance_remaining: 1.5,
            ..Default::default()
        });
    }

    #[test]
    fn humble_result_has_no_error_fields() {
        let r = NavigateGetResultResponse::decode(&[0, 1, 0, 0, 4, 0]).unwrap();
        assert_eq!(r, NavigateGetResultResponse { status: 4, ..Default::default() });
    }

    #[test]
    fn newer_feedback_is_read() {
        let mut bytes = NavigateFeedback { distance_remaining: 2.5, ..Default::default() }.encode();
        bytes.extend_from_slice(&[0; 64]);
        assert_eq!(NavigateFeedback::decode(&bytes).unwrap().distance_remaining, 2.5);
    }

    #[test]
    fn views_borrow() {
        let image = Image {
            header: Header::new(Timestamp(9), "cam"),
            height: 2,
            width: 2,
            encoding: "mono8".into(),
            step: 2,
            data: vec![1, 2, 3, 4],
            ..Default::default()
        };
        let bytes = image.encode();
        let view = ImageView::decode(&bytes).unwrap();
        assert_eq!((view.header.frame_id, view.encoding, view.data), ("cam", "mono8", &[1, 2, 3, 4][..]));
        assert!(bytes.as_ptr_range().contains(&view.data.as_ptr()));
        assert_eq!(view.encode(), bytes);
        let jpeg = CompressedImage { format: "jpeg".into(), data: vec![7; 3], ..Default::default() }.encode();
        assert_eq!(CompressedImageView::decode(&jpeg).unwrap().data, [7; 3]);
    }

    #[test]
    fn pieces_give_the_same() {
        fn check<T: RosType + PartialEq + std::fmt::Debug>(value: &T, gathers_below: usize) {
            let bytes = value.encode();
            for cut in 1..bytes.len() {
                let (a, b) = bytes.split_at(cut);
                let (b, c) = b.split_at(b.len() / 2);
                match T::decode_pieces(&mut [a, b, c].into_iter(), bytes.len()) {
                    Pieced::Done(got) => assert_eq!(&got, value, "cut at {cut}"),
                    Pieced::Gather => assert!(cut < gathers_below, "cut at {cut}"),
                    Pieced::Failed(e) => panic!("cut at {cut}: {e}"),
                }
            }
            for (total, ok) in [(bytes.len() - 1, false), (bytes.len() + 7, true), (bytes.len() + 8, false)] {
                let got = T::decode_pieces(&mut [&bytes[..]].into_iter(), total);
                assert_eq!(matches!(got, Pieced::Done(_)), ok, "{total} bytes said");
            }
        }
        let header = Header::new(Timestamp(9), "cam");
        let data: Vec<u8> = (0..100).collect();
        check(&CompressedImage { header: header.clone(), format: "jpeg".into(), data: data.clone() }, 40);
        let image = Image {
            header,
            encoding: "mono8".into(),
            width: 10,
            height: 10,
            step: 10,
            data,
            ..Default::default()
        };
        check(&image, 56);
        assert!(matches!(StringMsg::decode_pieces(&mut [&[0u8, 1][..]].into_iter(), 9), Pieced::Gather));
    }

    #[test]
    fn a_wrong_type_is_seen_by_its_length() {
        let pose = PoseStamped::default().encode();
        assert!(StringMsg::decode(&pose).is_err());
        assert!(PoseWithCovarianceStamped::decode(&pose).is_err());
        assert!(Clock::decode(&pose).is_err());
    }

    #[test]
    fn hashes_of_types_are_those_of_the_table() {
        fn check<T: RosType>() {
            assert_eq!(type_hash(T::NAME), Some(T::HASH), "{}", T::NAME);
        }
        check::<PoseStamped>();
        check::<PoseWithCovarianceStamped>();
        check::<TFMessage>();
        check::<Odometry>();
        check::<Path>();
        check::<CameraInfo>();
        check::<Image>();
        check::<CompressedImage>();
        check::<StringMsg>();
        check::<Clock>();
        check::<DiagnosticArray>();
        check::<Detection2DArray>();
        check::<Detection2D>();
        check::<GoalStatusArray>();
        check::<CancelGoalRequest>();
        check::<Twist>();
        check::<TwistStamped>();
        check::<TransformStamped>();
        check::<Header>();
        check::<Time>();
        check::<Pose>();
        check::<NavigateSendGoalRequest>();
        check::<NavigateGetResultResponse>();
    }

    #[test]
    fn names() {
        let pairs = [
            ("geometry_msgs/msg/PoseStamped", "geometry_msgs::msg::dds_::PoseStamped_"),
            ("nav2_msgs/action/NavigateToPose_SendGoal", "nav2_msgs::action::dds_::NavigateToPose_SendGoal_"),
        ];
        for (ros, dds) in pairs {
            assert_eq!(dds_name(ros), dds);
            assert_eq!(ros_name(dds).as_deref(), Some(ros));
        }
        assert_eq!(dds_name("sensor_msgs/Image"), "sensor_msgs::msg::dds_::Image_");
        assert_eq!(ros_name("nonsense"), None);
    }
}
