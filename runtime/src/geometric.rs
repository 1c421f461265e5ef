//! A goal pose by geometry alone, for models that have no lift heads.
//!
//! The imagined frames are placed by the landmarks that studying kept frames gave ([`crate::study`]): the camera's path in
//! the odometry's frame. The red box in the last frames says what the goal is, landmarks in it where. A drive that cannot be
//! placed, jumps, has surfaces where there are none (the paper's SD, one-sided, the maximum over frames), or has
//! something painted in is `inconsistent`, with the frame named.

use crate::context::GROUP;
use crate::ground::{Grounded, MindSpec, Scene};
use crate::image::{ModelCamera, RgbImage};
use crate::lift::distinct;
use crate::planar::{Pose2, wrap_angle};
use crate::study::FEATURE_WIDTH_MIN;
use mindseye_bridge::answer::{FramedPose2, FramedPose3, Status};
use mindseye_bridge::geometry::{Covariance6, planar_isometry, planar_pose};
use mindseye_landmarks::{
    Camera, Extractor, ExtractorConfig, GeometricLift, Gray, ImaginedFrame, Inconsistent, Lift, LiftConfig,
    PictureLift, RegisterConfig,
};
use nalgebra::{Matrix3, Vector3};

/// Why imagined frames are not placed at all.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NoGeometry {
    /// Too few pixels to recognise anything.
    #[error(
        "imagined frames of {width} pixels are too narrow to be placed by landmarks ({FEATURE_WIDTH_MIN} are needed)"
    )]
    Narrow {
        /// Their width.
        width: usize,
    },
    /// No kept frame was studied.
    #[error("there are no landmarks: {why}")]
    NoLandmarks {
        /// What became of the frames.
        why: String,
    },
}

/// Places the imagined frames of a drive whose last `boxed` frames show the box that was found, and answers by that.
/// `grounded` keeps its answer, with the reason added, where nothing can be placed at all.
pub fn answer(grounded: &mut Grounded, scene: &Scene, spec: &MindSpec, boxed: usize) {
    if grounded.answer.status != Status::Failed || grounded.frames.is_empty() {
        return;
    }
    let area = grounded.found_box.map(|b| b.edges());
    match place(&grounded.frames, area, boxed, scene, spec) {
        Ok(lifted) => publish(grounded, scene, lifted),
        Err(error) => {
            let so_far = grounded.answer.reason.take().map(|r| r + "; ").unwrap_or_default();
            grounded.answer.reason = Some(format!("{so_far}{error}"));
        }
    }
}

/// Lets the lift by landmarks vote on an answer of the model's own heads: where the imagined frames can be placed at all, and
/// both say where the goal is, they must be within `agree_max` spreads, and the answer is what both say, weighted by their
/// covariances. A drive that landmarks do not believe is `inconsistent`.
pub fn vote(grounded: &mut Grounded, scene: &Scene, spec: &MindSpec, boxed: usize, agree_max: f64) {
    if grounded.answer.status != Status::Found || grounded.frames.is_empty() {
        return;
    }
    let area = grounded.found_box.map(|b| b.edges());
    // What is shown may have been held to remembered pictures; the witness is what the network made by itself.
    let frames = grounded.guided.as_ref().map_or(&grounded.frames, |guided| &guided.video_only);
    let Ok(lifted) = place(frames, area, boxed, scene, spec) else { return };
    count(grounded, lifted, agree_max);
    let answer = &mut grounded.answer;
    if let (Some(pose), Some(mounting)) = (&answer.pose, scene.base_from_camera) {
        let at = planar_isometry(Pose2::new(pose.x, pose.y, pose.yaw)) * mounting;
        answer.camera_pose = Some(FramedPose3::new(pose.frame.clone(), &at));
    }
}

/// Counts the vote.
fn count(grounded: &mut Grounded, lifted: PictureLift, agree_max: f64) {
    let answer = &mut grounded.answer;
    let goal = lifted.verdict.as_ref().map(|()| lifted.goal.as_ref());
    let own = answer.pose.as_ref().zip(answer.covariance.as_ref()).map(|(pose, c)| {
        let at = [0, 1, 5];
        let covariance = Matrix3::from_fn(|i, j| c.get(6 * at[i] + at[j]).copied().unwrap_or(0.0));
        (Vector3::new(pose.x, pose.y, pose.yaw), covariance)
    });
    let against = match (goal, own) {
        // Landmarks know the way, not the thing: no vote.
        (Err(Inconsistent::NoObject { .. }), _) => None,
        (Err(error), _) => Some(format!("by landmarks: {error}")),
        (Ok(Some(goal)), Some((own, own_covariance))) => {
            let at = [0, 1, 5];
            let covariance = Matrix3::from_fn(|i, j| goal.covariance[(at[i], at[j])]);
            let mut apart = Vector3::from(goal.base) - own;
            apart.z = wrap_angle(apart.z);
            match weigh(&apart, &own_covariance, &covariance) {
                Some((spreads, _, _)) if spreads > agree_max => {
                    let (far, most) = distinct(spreads, agree_max);
                    Some(format!(
                        "by landmarks the goal is {:.2} m from where the model places it: {far} spreads, at most {most} are \
                         allowed",
                        apart.xy().norm()
                    ))
                }
                Some((_, step, both)) => {
                    if let (Some(pose), Some(c)) = (&mut answer.pose, &mut answer.covariance) {
                        pose.x += step.x;
                        pose.y += step.y;
                        pose.yaw = wrap_angle(pose.yaw + step.z);
                        for k in 0..9 {
                            if let Some(value) = c.get_mut(6 * at[k / 3] + at[k % 3]) {
                                *value = both[(k / 3, k % 3)];
                            }
                        }
                    }
                    None
                }
                None => None,
            }
        }
        _ => None,
    };
    if let Some(reason) = against {
        answer.status = Status::Inconsistent;
        // What is not believed is not handed out as a pose.
        (answer.pose, answer.covariance, answer.camera_pose) = (None, None, None);
        answer.reason = Some(reason);
    }
    grounded.geometry = Some(lifted);
}

/// Of two estimates that are `apart`, the second less the first: by how many spreads the places differ; the step from the
/// first to the mean by their covariances; its covariance. `None` where a covariance is singular.
fn weigh(
    apart: &Vector3<f64>,
    first: &Matrix3<f64>,
    second: &Matrix3<f64>,
) -> Option<(f64, Vector3<f64>, Matrix3<f64>)> {
    let sum = (first + second).fixed_view::<2, 2>(0, 0).try_inverse()?;
    let place = apart.xy();
    let spreads = (place.transpose() * sum * place)[0].max(0.0).sqrt();
    let gain = first * (first + second).try_inverse()?;
    Some((spreads, gain * apart, first - gain * first))
}

/// The camera that a model's pictures are of, where it looks through this one.
pub fn model_camera(model: ModelCamera, source: &Camera) -> Camera {
    match model.pinhole() {
        Some(own) => own.with_lens_of(source),
        None => source.filling(model.width as u32, model.height as u32),
    }
}

fn place(
    frames: &[RgbImage],
    area: Option<[f64; 4]>,
    boxed: usize,
    scene: &Scene,
    spec: &MindSpec,
) -> Result<PictureLift, NoGeometry> {
    let width = spec.camera.width;
    if width < FEATURE_WIDTH_MIN {
        return Err(NoGeometry::Narrow { width });
    }
    let studied = &scene.studied;
    let (Some(map), Some(source)) = (&studied.landmarks, &studied.camera) else {
        let why = studied.fault.clone().unwrap_or_else(|| studied.counts.to_string());
        return Err(NoGeometry::NoLandmarks { why });
    };
    let camera = model_camera(spec.camera, source);
    // The last frame of each latent, as they are shown.
    let shown = (GROUP - 1..frames.len()).step_by(GROUP);
    let first_boxed = frames.len().saturating_sub(boxed);
    let imagined: Vec<ImaginedFrame> = shown
        .map(|k| {
            let frame = &frames[k];
            let picture = Gray::from_rgb8(frame.width, frame.height, &frame.data);
            // Edges of pixels to their centres at integers.
            let area = area.filter(|_| k >= first_boxed).map(|a| a.map(|v| v - 0.5));
            ImaginedFrame { picture, area }
        })
        .collect();
    let start = scene.odom_from_base.zip(scene.base_from_camera);
    let mut map = map.clone();
    let mut lift = GeometricLift {
        map: &mut map,
        extractor: &mut Extractor::new(ExtractorConfig::default()),
        camera,
        map_from_start: start.map(|(base, mounting)| planar_isometry(base) * mounting),
        config: LiftConfig {
            register: RegisterConfig::for_width(width as u32),
            standoff_m: studied.standoff_m,
            ..LiftConfig::default()
        },
    };
    Ok(lift.lift(&imagined))
}

/// Puts a lift into the answer and its evidence.
fn publish(grounded: &mut Grounded, scene: &Scene, lifted: PictureLift) {
    let answer = &mut grounded.answer;
    let mounting = scene.base_from_camera;
    grounded.path = lifted
        .frames
        .iter()
        .filter_map(|f| f.placed.ok())
        .map(|p| {
            planar_pose(
                &(p.map_from_camera * mounting.unwrap_or_else(nalgebra::Isometry3::identity).inverse()),
            )
        })
        .collect();
    grounded.registered.clone_from(&grounded.path);
    answer.consistency = Some(consistency(&lifted));
    grounded.object = lifted.goal.as_ref().map(|goal| (goal.object.x, goal.object.y));
    match (&lifted.verdict, &lifted.goal) {
        (Ok(()), Some(goal)) => {
            let [x, y, yaw] = goal.base;
            let pose = Pose2::new(x, y, yaw);
            answer.status = Status::Found;
            answer.reason = None;
            answer.pose = Some(FramedPose2::new(scene.odom_frame.clone(), pose));
            answer.covariance = Some(on_the_ground(&goal.covariance));
            answer.camera_pose =
                mounting.map(|m| FramedPose3::new(scene.odom_frame.clone(), &(planar_isometry(pose) * m)));
        }
        (verdict, _) => {
            answer.status = Status::Inconsistent;
            let why = verdict.as_ref().err().map(ToString::to_string);
            answer.reason = Some(format!("by landmarks: {}", why.unwrap_or_else(|| "no goal".into())));
        }
    }
    grounded.geometry = Some(lifted);
}

/// Row by row, with what a planar pose does not say held by the ground.
pub(crate) fn on_the_ground(covariance: &nalgebra::Matrix6<f64>) -> Vec<f64> {
    let ground = Covariance6::planar(0.0, 0.0, 0.0).0;
    ground.iter().enumerate().map(|(k, held)| held + covariance[(k / 6, k % 6)]).collect()
}

/// Share of the frames that were placed, less what their surfaces are off: 0 at the largest SD that is believed.
fn consistency(lifted: &PictureLift) -> f64 {
    let all = lifted.frames.len().max(1) as f64;
    let placed = lifted.frames.iter().filter(|f| f.placed.is_ok()).count() as f64;
    let near = lifted.sd_m.map_or(1.0, |sd| 1.0 - sd / LiftConfig::default().sd_max_m);
    (placed / all * near).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_estimates_weigh_by_their_covariances() {
        let apart = Vector3::new(0.3, 0.0, 0.2);
        let first = Matrix3::from_diagonal(&Vector3::new(0.04, 0.01, 0.02));
        let second = Matrix3::from_diagonal(&Vector3::new(0.02, 0.01, 0.02));
        let (spreads, step, both) = weigh(&apart, &first, &second).unwrap();
        // By hand: .3 of a spread of the root of .06; two thirds of the way in x, half of it in yaw.
        assert!((spreads - 0.3 / 0.06f64.sqrt()).abs() < 1e-9);
        assert!((step - Vector3::new(0.2, 0.0, 0.1)).norm() < 1e-9, "{step}");
        let want = Vector3::new(0.04 / 3.0, 0.005, 0.01);
        assert!((both.diagonal() - want).norm() < 1e-9, "{both}");
        assert!(weigh(&apart, &Matrix3::zeros(), &Matrix3::zeros()).is_none());
    }

    #[test]
    fn a_models_camera_sees_what_its_lens_takes_of_a_frame() {
        let source = Camera::pinhole(416, 312, 341.0, 341.0, 207.5, 155.5).unwrap();
        let fixed = ModelCamera { width: 208, height: 128, focal_px: Some(104.0) };
        let camera = model_camera(fixed, &source);
        assert_eq!((camera.size(), camera.focal()), ((208, 128), (104.0, 104.0)));
        // 208 x 128 has another shape: the full width at half size, the middle 256 rows.
        let camera = model_camera(ModelCamera::any(208, 128), &source);
        assert_eq!((camera.size(), camera.focal()), ((208, 128), (170.5, 170.5)));
        let ray = camera.ray(nalgebra::Vector2::new(103.5, 63.5)).unwrap();
        assert!(ray.norm() < 1e-12, "the middle stays the middle: {ray}");
    }
}
