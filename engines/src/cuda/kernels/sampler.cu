// The sampler's arithmetic, over a sample that stays on the device.
#include "device.h"

// Parts that a step has.
enum { EULER = 1, CORRECT = 2, BACK = 4, PREDICT = 8, SLOPE = 16, CLEAN_PREDICTED = 32 };
// Numbers of one step: those of `Factors` in sampler.rs, and the weight of guidance.
struct Factors {
    int has;
    float sigma, by, keep, k, back, last, next_keep, next_k, slope, guidance;
};
// A sample of frames x channels x pixels; frame 0 of it is frame `first` of a pass, whose tensors are channels x
// pass_frames x pixels. Where `first` is negative, frame 0 is in no pass, and predicted to be 0.
struct Sample {
    int frames, channels, pixels, pass_frames, first;
};

DEVICE float velocity(const void* predicted, i64 at, int type, bool in, float x, const Factors& f) {
    float p = in ? load(predicted, at, type) : 0.f;
    return f.has & CLEAN_PREDICTED ? (x - p) / fmaxf(f.sigma, 1e-6f) : p;
}

// One step for `x`, from what one or two passes predict (`unconditional` is null without guidance): the estimate of the
// clean sample comes into `m1`, what was there into `m2`, the corrected sample into `previous`. All frames but the first
// go into the latents of the next pass, and with them its timesteps, `times` numbers a branch. The arithmetic is the
// host's, to the bit. Any grid of 256 threads.
KERNEL __launch_bounds__(256) void sampler_step(const void* __restrict__ conditional, int conditional_type, const void* __restrict__ unconditional,
                                                int unconditional_type, float* __restrict__ x, float* __restrict__ m1, float* __restrict__ m2,
                                                float* __restrict__ previous, float* __restrict__ latents, float* __restrict__ other_latents,
                                                const float* __restrict__ next_time, const float* __restrict__ other_next_time,
                                                float* __restrict__ time, float* __restrict__ other_time, int times, Sample s, Factors f) {
    int count = s.frames * s.channels * s.pixels;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
        int pixel = i % s.pixels, channel = i / s.pixels % s.channels, frame = i / s.pixels / s.channels;
        bool in = s.first + frame >= 0;
        i64 at = ((i64)channel * s.pass_frames + s.first + frame) * s.pixels + pixel;
        float before = x[i], v = velocity(conditional, at, conditional_type, in, before, f);
        if (unconditional) {
            float u = velocity(unconditional, at, unconditional_type, in, before, f);
            v = u + product(f.guidance, v - u);
        }
        float m = before - product(f.sigma, v), y = before;
        if (f.has & EULER) {
            y = before + product(f.by, v);
        } else {
            float p1 = m1[i], p2 = m2[i];
            if (f.has & CORRECT) {
                float curve = f.has & BACK ? product(f.back, p2 - p1) : 0.f;
                y = product(f.keep, previous[i]) + product(f.k, p1 + curve + product(f.last, m - p1));
            }
            previous[i] = y;
            float slope = f.has & SLOPE ? product(f.slope, p1 - m) : 0.f;
            y = f.has & PREDICT ? product(f.next_keep, y) + product(f.next_k, m + slope) : m;
            m2[i] = p1;
        }
        m1[i] = m;
        x[i] = y;
        if (frame == 0) continue;
        latents[at] = y;
        if (unconditional) other_latents[at] = y;
    }
    for (int i = blockIdx.x * 256 + threadIdx.x; i < times; i += gridDim.x * 256) {
        time[i] = next_time[i];
        if (unconditional) other_time[i] = other_next_time[i];
    }
}
