//! RIHS01 hashes by type name (REP-2016), for what is published raw: bags, recordings.

/// What Humble writes in place of a hash.
pub const HASH_NOT_SUPPORTED: &str = "TypeHashNotSupported";

/// The hash of a type (`pkg/msg/Name`) that does not differ between distributions; `None` when it is not
/// in the table. NavigateToPose's feedback differs and is left out: read it from the robot's tokens.
#[must_use]
pub fn type_hash(name: &str) -> Option<&'static str> {
    TABLE.binary_search_by_key(&name, |(n, _)| n).ok().map(|i| TABLE[i].1)
}

// One type per line, sorted by name.
#[rustfmt::skip]
const TABLE: &[(&str, &str)] = &[
    ("action_msgs/msg/GoalStatusArray", "RIHS01_6c1684b00f177d37438febe6e709fc4e2b0d4248dca4854946f9ed8b30cda83e"),
    ("action_msgs/srv/CancelGoal", "RIHS01_573d8b0a534451d7bc2ac8c5ffde8ac14b8593b7001175d0cd6516dcbeb8689a"),
    ("builtin_interfaces/msg/Time", "RIHS01_b106235e25a4c5ed35098aa0a61a3ee9c9b18d197f398b0e4206cea9acf9c197"),
    ("diagnostic_msgs/msg/DiagnosticArray", "RIHS01_5a8a36efb05fb25070fa0fb3810290c0e6cd4862b54a8fb975a1ee8dc55a333e"),
    ("example_interfaces/action/Fibonacci", "RIHS01_9508051da1ea4658de144b09bd0690ff3de52104683d847aed764d2915906f51"),
    ("example_interfaces/action/Fibonacci_FeedbackMessage", "RIHS01_c1de71afd52e49a89c53d8262366884185bc0a02f78ce051c4e46b0a7fe59bb2"),
    ("example_interfaces/action/Fibonacci_GetResult", "RIHS01_1b0de0d5d29dc955d92f546706568428632771db13ec84c15ec1c1a59f424a57"),
    ("example_interfaces/action/Fibonacci_SendGoal", "RIHS01_d1a57fb2a4afe8c21e34fb10db206f16ce6729b28531141472df92277c55b557"),
    ("example_interfaces/srv/AddTwoInts", "RIHS01_e118de6bf5eeb66a2491b5bda11202e7b68f198d6f67922cf30364858239c81a"),
    ("geometry_msgs/msg/PointStamped", "RIHS01_4c0296af86e01e562e9e0405d138a01537247580076c58ea38d7923ac1045897"),
    ("geometry_msgs/msg/Pose", "RIHS01_d501954e9476cea2996984e812054b68026ae0bfae789d9a10b23daf35cc90fa"),
    ("geometry_msgs/msg/PoseArray", "RIHS01_af0cc36d190e104d546d168d6b39df04fa4b4ccecf59cb4c9ed328d3d5004aa0"),
    ("geometry_msgs/msg/PoseStamped", "RIHS01_10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8"),
    ("geometry_msgs/msg/PoseWithCovarianceStamped", "RIHS01_26432f9803e43727d3c8f668d1fdb3c630f548af631e2f4e31382371bfea3b6e"),
    ("geometry_msgs/msg/TransformStamped", "RIHS01_0a241f87d04668d94099cbb5ba11691d5ad32c2f29682e4eb5653424bd275206"),
    ("geometry_msgs/msg/Twist", "RIHS01_9c45bf16fe0983d80e3cfe750d6835843d265a9a6c46bd2e609fcddde6fb8d2a"),
    ("geometry_msgs/msg/TwistStamped", "RIHS01_5f0fcd4f81d5d06ad9b4c4c63e3ea51b82d6ae4d0558f1d475229b1121db6f64"),
    ("nav2_msgs/action/NavigateToPose_GetResult", "RIHS01_c407920357d566771e8882b4ef4d1f1a84ee922d609920ccd57faa6d6e391dc5"),
    ("nav2_msgs/action/NavigateToPose_SendGoal", "RIHS01_a4fcb3bee1bf32e21a0e541a943b221aa0826996e2c98f079b47022b256f48b5"),
    ("nav_msgs/msg/OccupancyGrid", "RIHS01_8d348150c12913a31ee0ec170fbf25089e4745d17035792a1ba94d6f0bc0cfc7"),
    ("nav_msgs/msg/Odometry", "RIHS01_3cc97dc7fb7502f8714462c526d369e35b603cfc34d946e3f2eda2766dfec6e0"),
    ("nav_msgs/msg/Path", "RIHS01_1957a5bb3cee5da65c4e52e52b65a93df227efce4c20f8458b36e73066ca334b"),
    ("rcl_interfaces/msg/ParameterEvent", "RIHS01_043e627780fcad87a22d225bc2a037361dba713fca6a6b9f4b869a5aa0393204"),
    ("rcl_interfaces/srv/DescribeParameters", "RIHS01_845b484d71eb0673dae682f2e3ba3c4851a65a3dcfb97bddd82c5b57e91e4cff"),
    ("rcl_interfaces/srv/GetParameterTypes", "RIHS01_da199c878688b3e530bdfe3ca8f74cb9fa0c303101e980a9e8f260e25e1c80ca"),
    ("rcl_interfaces/srv/GetParameters", "RIHS01_bf9803d5c74cf989a5de3e0c2e99444599a627c7ff75f97b8c05b01003675cbc"),
    ("rcl_interfaces/srv/ListParameters", "RIHS01_3e6062bfbb27bfb8730d4cef2558221f51a11646d78e7bb30a1e83afac3aad9d"),
    ("rcl_interfaces/srv/SetParameters", "RIHS01_56eed9a67e169f9cb6c1f987bc88f868c14a8fc9f743a263bc734c154015d7e0"),
    ("rcl_interfaces/srv/SetParametersAtomically", "RIHS01_0e192ef259c07fc3c07a13191d27002222e65e00ccec653ca05e856f79285fcd"),
    ("rosgraph_msgs/msg/Clock", "RIHS01_692f7a66e93a3c83e71765d033b60349ba68023a8c689a79e48078bcb5c58564"),
    ("sensor_msgs/msg/CameraInfo", "RIHS01_b3dfd68ff46c9d56c80fd3bd4ed22c7a4ddce8c8348f2f59c299e73118e7e275"),
    ("sensor_msgs/msg/CompressedImage", "RIHS01_15640771531571185e2efc8a100baf923961a4d15d5569652e6cb6691e8e371a"),
    ("sensor_msgs/msg/Image", "RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47"),
    ("sensor_msgs/msg/Imu", "RIHS01_7d9a00ff131080897a5ec7e26e315954b8eae3353c3f995c55faf71574000b5b"),
    ("sensor_msgs/msg/JointState", "RIHS01_a13ee3a330e346c9d87b5aa18d24e11690752bd33a0350f11c5882bc9179260e"),
    ("sensor_msgs/msg/LaserScan", "RIHS01_64c191398013af96509d518dac71d5164f9382553fce5c1f8cca5be7924bd828"),
    ("sensor_msgs/msg/PointCloud2", "RIHS01_9198cabf7da3796ae6fe19c4cb3bdd3525492988c70522628af5daa124bae2b5"),
    ("std_msgs/msg/Bool", "RIHS01_feb91e995ff9ebd09c0cb3d2aed18b11077585839fb5db80193b62d74528f6c9"),
    ("std_msgs/msg/Empty", "RIHS01_20b625256f32d5dbc0d04fee44f43c41e51c70d3502f84b4a08e7a9c26a96312"),
    ("std_msgs/msg/Float32", "RIHS01_7170d3d8f841f7be3172ce5f4f59f3a4d7f63b0447e8b33327601ad64d83d6e2"),
    ("std_msgs/msg/Header", "RIHS01_f49fb3ae2cf070f793645ff749683ac6b06203e41c891e17701b1cb597ce6a01"),
    ("std_msgs/msg/Int32", "RIHS01_b6578ded3c58c626cfe8d1a6fb6e04f706f97e9f03d2727c9ff4e74b1cef0deb"),
    ("std_msgs/msg/String", "RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18"),
    ("std_srvs/srv/Empty", "RIHS01_5888399dedec5ccc85ea6451949fd2c9f97bfdf963f9a588821639fcd31b5d19"),
    ("std_srvs/srv/SetBool", "RIHS01_abe9e4bb6b41b40e6789712c00ec8871923e089af3f667a79992a428cff2da0a"),
    ("std_srvs/srv/Trigger", "RIHS01_eeff2cd6fa5ad9d27cdf4dec64818317839b62f212a91e6b5304b634b2062c5f"),
    ("tf2_msgs/msg/TFMessage", "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087"),
    ("type_description_interfaces/srv/GetTypeDescription", "RIHS01_69b9c19c1021405984cc60dbbb1edceb147a6538b411d812ba6afabeed962cd5"),
    ("vision_msgs/msg/Detection2D", "RIHS01_0d12b69df5c593b3455b7346fac8205437a7d4bcb09b9e0e0b2dde787ded38ea"),
    ("vision_msgs/msg/Detection2DArray", "RIHS01_214274120007f4a683866481336b70310268cfa107aebe9d594a6acf75bda968"),
    ("vision_msgs/msg/Detection3D", "RIHS01_ddd703be132ab0b69d33121f1bb034132bfbb3b0ac5f9fb1516005ba1c8a265b"),
    ("vision_msgs/msg/Detection3DArray", "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018"),
    ("visualization_msgs/msg/Marker", "RIHS01_45b13ccf791f225962bf74e746f9644518855d783a6f42ba0cc14fde2b4f3ce0"),
    ("visualization_msgs/msg/MarkerArray", "RIHS01_86cb8800b6fb05b5eff1abd7a56f62a5641d3ae9a1c29e78e67e704f1d067dcf"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_well_formed() {
        assert!(TABLE.windows(2).all(|w| w[0].0 < w[1].0));
        for (name, hash) in TABLE {
            let hex = hash.strip_prefix("RIHS01_").unwrap_or_else(|| panic!("{name}"));
            assert!(hex.len() == 64 && hex.bytes().all(|b| b"0123456789abcdef".contains(&b)), "{name}");
            assert_eq!(name.matches('/').count(), 2, "{name}");
        }
        assert_eq!(type_hash("std_msgs/msg/Nothing"), None);
    }
}
