/* Stand-in for Apple's CoreFoundation: what metal-cpp's headers name. */
#pragma once

#include <dispatch/dispatch.h>
#include <objc/objc.h>
#include <objc/runtime.h>
#include <stdbool.h>
#include <stdint.h>

typedef double CFTimeInterval;
typedef CFTimeInterval CFAbsoluteTime;
typedef signed long CFIndex;
typedef const struct __CFString* CFStringRef;
