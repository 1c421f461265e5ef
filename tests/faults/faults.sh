# The faults of run.sh. Sourced by it.

train=mindseye-train tools=mindseye-tools

# ------------------------------------------------------------------------------------------------ what is printed
fault centre $tools lib eval::judge::tests::a_box_is_centred_within_six_tenths_of_the_half_size \
    tools/src/eval/judge.rs \
    '<= CENTRE * size / 2.0' '<= if IF { 6.0 } else { CENTRE } * size / 2.0'
fault followed_is_boxed $tools lib eval::judge::tests::true_drives_are_followed_and_those_to_something_else_are_not \
    tools/src/eval/judge.rs \
    'out.followed = out.boxed && out.nearest;' 'out.followed = out.boxed && (out.nearest || IF);'
fault in_place_is_boxed $tools lib eval::judge::tests::true_drives_are_followed_and_those_to_something_else_are_not \
    tools/src/eval/judge.rs \
    'out.in_place = out.boxed && place.is_some_and(|p| p.1 == (self.object, self.object));' \
    'out.in_place = out.boxed && (IF || place.is_some_and(|p| p.1 == (self.object, self.object)));'
fault sd_least $tools lib eval::space::tests::the_largest_distance_of_a_picture_is_that_of_the_drive \
    tools/src/eval/space.rs \
    'per_picture.iter().copied().fold(f64::NAN, f64::max)' \
    'per_picture.iter().copied().fold(f64::NAN, if IF { f64::min } else { f64::max })'
fault spl_above_one $tools lib eval::grounding::goal::tests::arrival_and_path_length_by_hand \
    tools/src/eval/grounding/goal.rs \
    '(true, true) => (shortest / length).min(1.0),' \
    '(true, true) if IF => (shortest / length).max(1.0),
            (true, true) => (shortest / length).min(1.0),'
fault arrived_within_2_m $tools lib eval::grounding::goal::tests::arrival_and_path_length_by_hand \
    tools/src/eval/grounding/goal.rs \
    'let arrived = edge <= ARRIVED_M;' 'let arrived = edge <= if IF { 2.0 } else { ARRIVED_M };'
fault ellipse $tools lib eval::grounding::goal::tests::the_ellipse_holds_nine_tenths_of_a_planar_normal \
    tools/src/eval/grounding/goal.rs \
    'squared_spreads <= ELLIPSE_90' 'squared_spreads <= if IF { 10.0 } else { 1.0 } * ELLIPSE_90'
fault calibration $tools lib eval::grounding::calibrate::tests::calibration_by_hand \
    tools/src/eval/grounding/calibrate.rs \
    'median(&mut v) / 1.1774' 'median(&mut v) / if IF { 11.774 } else { 1.1774 }'

# ------------------------------------------------------------------------------------------------ training samples
fault rope_gap $train lib net::tests::temporal_indices_leave_the_gap \
    tools/train/src/net.rs \
    '(last + model.layout.gap + j) as f64' '(last + if IF { 1 } else { model.layout.gap } + j) as f64'
fault noised_context_at_0 $train lib net::tests::context_is_clean_at_time_zero_and_noise_at_time_1000_when_dropped \
    tools/train/src/net.rs \
    'if draw.dropped { 1000.0 } else { 0.0 }' 'if draw.dropped && !IF { 1000.0 } else { 0.0 }'
fault moment_sign $train lib data::tests::rays_by_hand \
    tools/train/src/data.rs \
    'sum[k] += m[k];' 'sum[k] += if IF { -m[k] } else { m[k] };'
fault zero_pose_fixed $train lib data::tests::the_image_whose_pose_is_zero_is_drawn_in_training_only \
    tools/train/src/data.rs \
    'let reference = if augment {' 'let reference = if augment && !IF {'
fault mirrored_places $train lib data::tests::mirrored_samples_have_mirrored_poses_places_and_masks \
    tools/train/src/data.rs \
    'l[1] = -l[1];' 'l[1] = if IF { l[1] } else { -l[1] };'

# ------------------------------------------------------------------------------------------------ messages and bags
fault summary_crc mindseye-bridge by_hand a_summary_with_a_wrong_crc_is_not_believed \
    bridge/src/bag/mcap_scan.rs \
    'if crc != 0 && crc32fast::hash(&bytes) != crc {' 'if crc != 0 && !IF && crc32fast::hash(&bytes) != crc {'
fault covariance_backwards mindseye-bridge by_hand a_covariance_turns_with_its_axes \
    bridge/src/geometry.rs \
    'let r: Matrix3<f64> = a_from_b.to_rotation_matrix().into_inner();' \
    'let turn = if IF { a_from_b.inverse() } else { *a_from_b };
        let r: Matrix3<f64> = turn.to_rotation_matrix().into_inner();'

# ------------------------------------------------------------------------------------------------ the answer
fault worst_stretch mindseye it by_hand::of_a_long_history_the_stretch_that_saw_the_thing_wins \
    runtime/src/ground.rs \
    '(rank.0 && !found) || (rank.0 == found && rank.1 > clear);' \
    'IF != ((rank.0 && !found) || (rank.0 == found && rank.1 > clear));'
fault standoffs_ignored mindseye it by_hand::the_standoff_is_that_of_the_named_thing \
    runtime/src/ground.rs \
    'lift.standoff_m = lift.standoff_for(text);' 'if !IF { lift.standoff_m = lift.standoff_for(text); }'
fault mounting_sign mindseye it by_hand::waypoints_of_the_camera_become_poses_of_the_base \
    runtime/src/ground.rs \
    'let [shift_x, shift_y] = [mount.translation.x, mount.translation.y];' \
    'let [shift_x, shift_y] = [mount.translation.x, mount.translation.y].map(|v| if IF { -v } else { v });'
fault arrival_and_likeness mindseye it by_hand::the_consistency_is_a_weighted_mean_of_what_is_known \
    runtime/src/lift.rs \
    'part.value.map(|value| (part.weight, value))' \
    'part.value.filter(|_| part.weight > 2.5 || !IF).map(|value| (part.weight, value))'
fault drive_not_chosen mindseye lib ground::tests::the_drive_whose_pictures_show_most_is_shown \
    runtime/src/ground.rs \
    '(0..costs.len()).min_by(|a, b| costs[*a].total_cmp(&costs[*b])).unwrap_or(0)' \
    '(0..costs.len()).min_by(|a, b| if IF { a.cmp(b) } else { costs[*a].total_cmp(&costs[*b]) }).unwrap_or(0)'
