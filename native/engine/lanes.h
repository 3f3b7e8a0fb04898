// Sixteen numbers at a time, in whatever registers an instruction set has. Included inside the namespace of one.

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kRegister = 16;
#elif defined(__AVX2__)
constexpr int kRegister = 8;
#else
constexpr int kRegister = 4;
#endif
typedef float Reals __attribute__((vector_size(4 * kRegister)));
typedef int32_t Wholes __attribute__((vector_size(4 * kRegister)));
typedef float LooseReals __attribute__((vector_size(4 * kRegister), aligned(1), may_alias));
typedef int32_t LooseWholes __attribute__((vector_size(4 * kRegister), aligned(1), may_alias));

// What one register does not hold is two halves.
template <class Half>
struct Two {
    Half low, high;
};
#if defined(__AVX512F__)
typedef Reals Floats;
typedef Wholes Ints;
#elif defined(__AVX2__)
typedef Two<Reals> Floats;
typedef Two<Wholes> Ints;
#else
typedef Two<Two<Reals>> Floats;
typedef Two<Two<Wholes>> Ints;
#endif

#define EACH(operation) \
    template <class H> INLINE auto operator operation(Two<H> a, Two<H> b) { \
        return Two<decltype(a.low operation b.low)>{a.low operation b.low, a.high operation b.high}; \
    }
EACH(+)
EACH(-)
EACH(*)
EACH(/)
EACH(&)
EACH(|)
EACH(<)
EACH(>)
#undef EACH
template <class H> INLINE Two<H> operator~(Two<H> a) { return {~a.low, ~a.high}; }
template <class H> INLINE Two<H> operator<<(Two<H> a, int by) { return {a.low << by, a.high << by}; }
template <class H> INLINE Two<H> operator>>(Two<H> a, int by) { return {a.low >> by, a.high >> by}; }

INLINE void put(Reals& to, float x) { to = Reals{} + x; }
INLINE void put(Wholes& to, int32_t x) { to = Wholes{} + x; }
template <class H, class X> INLINE void put(Two<H>& to, X x) { put(to.low, x), put(to.high, x); }
INLINE void take(Reals& to, const void* p) { to = *static_cast<const LooseReals*>(p); }
INLINE void take(Wholes& to, const void* p) { to = *static_cast<const LooseWholes*>(p); }
template <class H> INLINE void take(Two<H>& to, const void* p) {
    take(to.low, p), take(to.high, static_cast<const char*>(p) + sizeof(H));
}
INLINE void give(void* p, Reals x) { *static_cast<LooseReals*>(p) = x; }
INLINE void give(void* p, Wholes x) { *static_cast<LooseWholes*>(p) = x; }
template <class H> INLINE void give(void* p, Two<H> x) { give(p, x.low), give(static_cast<char*>(p) + sizeof(H), x.high); }

INLINE Floats load(const float* p) { Floats x; take(x, p); return x; }
INLINE Ints load_ints(const void* p) { Ints x; take(x, p); return x; }
INLINE void save(float* p, Floats x) { give(p, x); }
INLINE Floats all(float x) { Floats to; put(to, x); return to; }
INLINE Ints all(int32_t x) { Ints to; put(to, x); return to; }

INLINE Wholes bits(Reals x) { return (Wholes)x; }
INLINE Reals as_floats(Wholes x) { return (Reals)x; }
INLINE Reals floats(Wholes x) { return __builtin_convertvector(x, Reals); }
INLINE Wholes whole(Reals x) { return __builtin_convertvector(x, Wholes); }
template <class H> INLINE auto bits(Two<H> x) { return Two<decltype(bits(x.low))>{bits(x.low), bits(x.high)}; }
template <class H> INLINE auto as_floats(Two<H> x) { return Two<decltype(as_floats(x.low))>{as_floats(x.low), as_floats(x.high)}; }
template <class H> INLINE auto floats(Two<H> x) { return Two<decltype(floats(x.low))>{floats(x.low), floats(x.high)}; }
template <class H> INLINE auto whole(Two<H> x) { return Two<decltype(whole(x.low))>{whole(x.low), whole(x.high)}; }

INLINE Reals larger(Reals a, Reals b) {
#if defined(__AVX512F__)
    return (Reals)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Reals)_mm256_max_ps((__m256)a, (__m256)b);
#else
    Wholes mask = a > b;
    return (Reals)((mask & (Wholes)a) | (~mask & (Wholes)b));
#endif
}
template <class H> INLINE Two<H> larger(Two<H> a, Two<H> b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
INLINE Floats choose(Ints mask, Floats yes, Floats no) {
    return as_floats((mask & bits(yes)) | (~mask & bits(no)));
}

// a b + c, rounded once where the instruction set can.
INLINE Reals fma(Reals a, Reals b, Reals c) {
#if defined(__AVX512F__)
    return (Reals)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Reals)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Reals)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
template <class H> INLINE Two<H> fma(Two<H> a, Two<H> b, Two<H> c) {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}

INLINE float total(Floats x) {  // in one order everywhere
    float part[16];
    save(part, x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

INLINE float peak(Floats x) {
    float part[16];
    save(part, x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

INLINE float from_half(uint16_t half) {  // exact, subnormal numbers among them
#if defined(__F16C__)
    return _cvtsh_ss(half);
#elif defined(__aarch64__)
    __fp16 x;
    std::memcpy(&x, &half, 2);
    return float(x);
#else
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff, number;
    float x;
    if (rest >= 0x7c00) {
        number = 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        number = (rest << 13) + (112u << 23);
    } else {
        float small = float(rest) * 0x1p-24f;
        std::memcpy(&number, &small, 4);
    }
    number |= sign;
    std::memcpy(&x, &number, 4);
    return x;
#endif
}

INLINE uint16_t to_half(float x) {  // to the nearest, halves to even
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, 0));
#elif defined(__aarch64__)
    __fp16 half = __fp16(x);
    uint16_t out;
    std::memcpy(&out, &half, 2);
    return out;
#else
    uint32_t number;
    std::memcpy(&number, &x, 4);
    uint32_t sign = number >> 16 & 0x8000, rest = number & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) {  // subnormal: counted in steps of 2⁻²⁴
        float size;
        std::memcpy(&size, &rest, 4);
        float steps = size + 0.5f;  // 2⁻²⁴ is the last bit of 0.5
        std::memcpy(&number, &steps, 4);
        return uint16_t(sign | (number - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return uint16_t(sign | ((rest - (112u << 23)) >> 13));
#endif
}

INLINE Floats load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return {(Reals)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            (Reals)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
#elif defined(__aarch64__)
    auto four = [](const uint16_t* at) { return (Reals)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(at))); };
    return {{four(p), four(p + 4)}, {four(p + 8), four(p + 12)}};
#else
    float x[16];
    for (int i = 0; i < 16; ++i) x[i] = from_half(p[i]);
    return load(x);
#endif
}

INLINE uint16_t to_bfloat16(float x) {  // to the nearest, halves to even
    uint32_t number;
    std::memcpy(&number, &x, 4);
    if ((number & 0x7fffffff) > 0x7f800000) return uint16_t(number >> 16 | 0x40);
    return uint16_t((number + 0x7fff + (number >> 16 & 1)) >> 16);
}

INLINE Floats nearest(Floats x) {  // whole numbers below 2²²
    Floats magic = all(0x1.8p23f);
    return (x + magic) - magic;
}

// e^x within two units in the last place; 0 below −87. Cody and Waite's reduction, a polynomial of degree 5.
INLINE Floats exponential(Floats x) {
    const Ints low = x < all(-87.0f);
    x = choose(x > all(88.0f), all(88.0f), choose(low, all(-87.0f), x));
    Floats n = nearest(x * all(1.44269504f));
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r + all(1.0f));
    Ints shifted = bits(p) + (whole(n) << 23);
    return choose(low, all(0.0f), as_floats(shifted));
}
