//! What a detector's things say of a goal: alone, or beside the model.
//!
//! * The model has nothing to say (it has no word for the thing, was trained on other pictures, gives no pose, or there is
//!   none): the answer is the detector's alone, and says so.
//! * The model found the thing: the detector's nearest thing of that class must be where the model says, within the
//!   spreads of both; otherwise `inconsistent`. A thing that the detector has not seen speaks neither for nor against.
//! * The model found nothing where the detector did: `inconsistent`.

use crate::geometric::on_the_ground;
use crate::ground::{Grounded, Scene};
use crate::lift::distinct;
use crate::planar::Pose2;
use mindseye_bridge::answer::{FramedPose2, FramedPose3, Status};
use mindseye_bridge::geometry::planar_isometry;
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_engines::text::class_of;
use mindseye_landmarks::{MapObject, Standing, stand_before};
use nalgebra::Point3;

/// Least share of the frames that should show a thing in which it was seen.
const SEEN_MIN: f64 = 0.3;
/// The base stands no nearer than this (metres) to a thing's middle, and half its width further away.
const STANDOFF_MIN_M: f64 = 0.5;

/// A thing of the class that was asked for, and where to stand before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Testimony {
    /// Name of its class.
    pub class: String,
    /// The thing.
    pub object: MapObject,
    /// How many of its class are known.
    pub of: usize,
    /// Where the base should stand.
    pub standing: Standing,
}

/// Brings what the detector saw together with what the model says. `unsuited`: the model has nothing to say of this goal
/// or place. Witnesses may be `agree_max` spreads apart.
pub fn join(grounded: &mut Grounded, scene: &Scene, goal: &Goal, unsuited: bool, agree_max: f64) {
    let (GoalKind::Text(text), Some(classes)) = (&goal.kind, &scene.studied.classes) else { return };
    let answer = &mut grounded.answer;
    let class = match class_of(classes, text) {
        Ok(class) => class,
        Err(error) => {
            // The model alone decides about what the detector has no word for.
            if unsuited {
                add(&mut answer.reason, error.to_string());
            }
            return;
        }
    };
    answer.class = Some(classes[class].clone());
    let things: Vec<&MapObject> = scene
        .studied
        .objects
        .iter()
        .filter(|o| o.class == class && f64::from(o.views) >= SEEN_MIN * f64::from(o.views + o.missed))
        .collect();
    if unsuited {
        return alone(grounded, scene, &classes[class], &things);
    }
    let Some(place) = grounded.object.filter(|_| grounded.answer.status == Status::Found) else {
        if grounded.answer.status == Status::NotInContext && !things.is_empty() {
            let name = &classes[class];
            let seen = things.iter().map(|o| o.views).max().unwrap_or(0);
            grounded.answer.status = Status::Inconsistent;
            add(&mut grounded.answer.reason, format!("but the detector saw a {name} in {seen} frames"));
        }
        return;
    };
    let apart = |o: &MapObject| (o.position.x - place.0).hypot(o.position.y - place.1);
    let Some(nearest) = things.into_iter().min_by(|a, b| apart(a).total_cmp(&apart(b))) else { return };
    let own = grounded.answer.covariance.as_ref().map_or(0.0, |c| c[0].max(c[7]));
    let spread = (own + nearest.sigma_m().powi(2)).sqrt().max(1e-6);
    let spreads = apart(nearest) / spread;
    let answer = &mut grounded.answer;
    answer.views = Some(nearest.views);
    if spreads > agree_max {
        let (far, most) = distinct(spreads, agree_max);
        answer.status = Status::Inconsistent;
        // What is not believed is not handed out as a pose.
        (answer.pose, answer.covariance, answer.camera_pose) = (None, None, None);
        answer.reason = Some(format!(
            "the detector's nearest {} is {:.2} m from where the model places it: {far} spreads, at most {most} are allowed",
            classes[class],
            apart(nearest)
        ));
    }
}

/// Answers by the detector alone.
fn alone(grounded: &mut Grounded, scene: &Scene, class: &str, things: &[&MapObject]) {
    let answer = &mut grounded.answer;
    let why = answer.reason.take();
    answer.imagined = false;
    answer.consistency = None;
    let counts = &scene.studied.counts;
    let not_known = |reason: String| {
        [Some(reason), why.clone(), scene.studied.fault.clone()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("; ")
    };
    let Some(testimony) = testify(scene, class, things) else {
        answer.status = Status::NotInContext;
        answer.reason = Some(not_known(match counts {
            c if c.detected == 0 && c.without_pose > 0 => format!(
                "the detector looked at no frame: {} came without a pose of the camera (odometry, and its mounting in \
                 /tf_static or [camera])",
                c.without_pose
            ),
            c => format!(
                "the detector has placed no {class}: {} boxes in {} frames, of which the robot may have seen none from \
                 several places",
                c.boxes, c.detected
            ),
        }));
        return;
    };
    let [x, y, yaw] = testimony.standing.base;
    let pose = Pose2::new(x, y, yaw);
    answer.status = Status::Found;
    answer.stamp_ns = Some(scene.captured_at.as_nanos());
    answer.pose = Some(FramedPose2::new(scene.odom_frame.clone(), pose));
    answer.covariance = Some(on_the_ground(&testimony.standing.covariance));
    answer.camera_pose = scene
        .base_from_camera
        .map(|mounting| FramedPose3::new(scene.odom_frame.clone(), &(planar_isometry(pose) * mounting)));
    answer.views = Some(testimony.object.views);
    let which = match testimony.of {
        1 => String::new(),
        n => format!(" (the nearest of {n})"),
    };
    let without = why.map(|why| format!("; nothing was imagined: {why}")).unwrap_or_default();
    answer.reason = Some(format!(
        "the detector alone: a {class}{which} seen in {} frames{without}",
        testimony.object.views
    ));
    grounded.object = Some((testimony.object.position.x, testimony.object.position.y));
    grounded.path.clear();
    grounded.registered.clear();
    grounded.frames.clear();
    grounded.found_box = None;
    grounded.answer.bounding_box = None;
}

fn add(reason: &mut Option<String>, more: String) {
    *reason = Some(match reason.take() {
        Some(reason) => format!("{reason}; {more}"),
        None => more,
    });
}

/// The thing to go to: the nearest to the base, or the one seen most where nobody knows where that is. The base stands on the
/// side from which it was seen that is least of a way round.
fn testify(scene: &Scene, class: &str, things: &[&MapObject]) -> Option<Testimony> {
    let far = |o: &MapObject| match scene.odom_from_base {
        Some(base) => (o.position.x - base.x).hypot(o.position.y - base.y),
        None => 1.0 / f64::from(o.views.max(1)),
    };
    let object = *things.iter().min_by(|a, b| far(a).total_cmp(&far(b)))?;
    let middle = object.position;
    let bearing = |x: f64, y: f64| (y - middle.y).atan2(x - middle.x);
    let here = scene.odom_from_base.map(|base| bearing(base.x, base.y));
    let turn = |eye: &Point3<f64>| {
        here.map_or(0.0, |here| crate::planar::wrap_angle(bearing(eye.x, eye.y) - here).abs())
    };
    let eye = object.seen_from().min_by(|a, b| turn(a).total_cmp(&turn(b)))?;
    let away = (eye.x - middle.x).hypot(eye.y - middle.y);
    let least = STANDOFF_MIN_M + 0.5 * object.size[0];
    // What lies behind the camera that saw it was not seen.
    let standoff_m = scene.studied.standoff_m.max(least).min(away.max(least));
    let standing = stand_before(&middle, &object.covariance, &eye, standoff_m)?;
    Some(Testimony { class: class.to_owned(), object: object.clone(), of: things.len(), standing })
}

#[cfg(test)]
mod tests;
