// Which way imports may point. One public index.ts a folder of plugin/, agent/ and core/.
module.exports = {
  forbidden: [
    { name: 'no-cycles', severity: 'error', from: {}, to: { circular: true, dependencyTypesNot: ['type-only'] } },
    { name: 'core-stands-alone', severity: 'error', from: { path: '^core/' }, to: { path: '^(plugin|agent|cli|web|bench|test)/' } },
    { name: 'plugin-knows-core-only', severity: 'error', from: { path: '^plugin/' }, to: { path: '^(agent|cli|web|bench|test)/' } },
    { name: 'agent-knows-core-only', severity: 'error', from: { path: '^agent/' }, to: { path: '^(plugin|cli|web|bench|test)/' } },
    { name: 'cli-talks-to-apis-only', severity: 'error', from: { path: '^(cli|web)/' }, to: { path: '^(plugin|agent|bench|test)/' } },
    { name: 'product-never-imports-tests', severity: 'error', from: { path: '^(core|plugin|agent|cli|web)/' }, to: { path: '^(test|bench)/' } },
    { name: 'core-by-its-index', severity: 'error', from: { path: '^(plugin|agent|cli)/' }, to: { path: '^core/[^/]+/', pathNot: '^core/[^/]+/index\\.ts$' } },
    { name: 'capability-by-its-index', severity: 'error', from: { path: '^(plugin|agent)/([^/]+)/' }, to: { path: '^$1/([^/]+)/', pathNot: ['^$1/$2/', '^$1/[^/]+/index\\.ts$'] } },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    exclude: { path: '(^|/)(dist|node_modules)/' },
    tsPreCompilationDeps: true,
    tsConfig: { fileName: 'tsconfig.json' },
    enhancedResolveOptions: { extensions: ['.ts', '.js', '.mjs', '.json'], exportsFields: ['exports'], conditionNames: ['import', 'node', 'default'] },
  },
}
