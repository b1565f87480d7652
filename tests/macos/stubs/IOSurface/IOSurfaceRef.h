/* Stand-in for Apple's IOSurface: what metal-cpp's headers name. */
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
